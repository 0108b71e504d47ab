"""Which parameters drive which hidden groups, through which operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import brainstate
import jax

from .._jax import Atom, Var
from .._ops.primitive import ETPPrimitive
from .._ops.stacked import StackedPrimitive
from .._types import Path, PyTree, Shape, path_str
from .flow import title_of
from .groups import HiddenGroup
from .jacobian import Fold
from .operands import OperandProgram

__all__ = ["HiddenParamOpRelation"]


class _SubStep(NamedTuple):
    """Stands for a variable of one sub-step."""

    aval: jax.ShapeDtypeStruct

    @classmethod
    def of(cls, var: Atom) -> _SubStep:
        return cls(jax.ShapeDtypeStruct(var.aval.shape[1:], var.aval.dtype))


class HiddenParamOpRelation(NamedTuple):
    """One operation whose trained operands come from parameters and whose output reaches a hidden group directly.

    Attributes
    ----------
    key : tuple
        ``(path of the first parameter, call index)``: names the relation.
    primitive : ETPPrimitive
    x_var, y_var : Var or None, Var
        Input and output of the operation (``.aval.shape``, ``.aval.dtype``).
    hidden_groups : tuple of HiddenGroup
        The groups that the output reaches without passing through another group.
    connected_hidden_paths : tuple of path
    eqn_params : dict
        Static parameters of the operation.
    path_classification : dict
        Hidden path -> ``'all_direct'``, or ``'mixed'`` where the output also acts through another operation.
    trainable_vars, trainable_paths, trainable_leaf_indices, trainable_param_states : dict
        Per trainable key: the operand variable, the path of its parameter, the leaf number within the parameter's
        value and the parameter. The first parameter is named where an operand is computed from several.
    fixed_vars : dict
        Operands that are neither trained nor the input, by position.
    constant : frozenset of int
        Those of them that are the same at every step.
    op_index : int
        Number of the operation among the marked operations of the step.
    parameter_paths : tuple of path
        Every parameter that the trained operands are computed from.
    operand_program : OperandProgram
    residual_free : bool
        Whether every path from the output to the loss is through its hidden groups position by position.
    offset_keys : tuple of str
        Trained operands whose gradient does not depend on the input (a bias).
    affine_keys : tuple of str
        Trained operands whose gradient depends on the input, and is not known to vanish with it.
    linear_keys : tuple of str
        Trained operands whose gradient does not depend on the operands themselves (no hook).
    varying : frozenset of int
        Operands among ``fixed_vars`` that change from step to step and that the gradient of trained ones depends on.
    """

    key: tuple[Path, int]
    primitive: ETPPrimitive
    x_var: Atom | _SubStep | None
    y_var: Var | _SubStep
    hidden_groups: tuple[HiddenGroup, ...]
    connected_hidden_paths: tuple[Path, ...]
    eqn_params: dict[str, Any]
    path_classification: dict[Path, str]
    trainable_vars: dict[str, Var]
    trainable_paths: dict[str, Path]
    trainable_leaf_indices: dict[str, int]
    trainable_param_states: dict[str, brainstate.ParamState]
    fixed_vars: Mapping[int, Atom | _SubStep]
    constant: frozenset[int]
    op_index: int
    parameter_paths: tuple[Path, ...]
    operand_program: OperandProgram
    residual_free: bool
    offset_keys: tuple[str, ...]
    affine_keys: tuple[str, ...]
    linear_keys: tuple[str, ...]
    varying: frozenset[int] = frozenset()

    @property
    def is_static(self) -> bool:
        """Whether the trained operands are the same at every step while the parameters are."""
        return self.operand_program.inputs == self.operand_program.leaves

    @property
    def sub_steps(self) -> int | None:
        """The number of sub-steps along a first axis of input and output, of an operation in a long loop."""
        return self.y_var.aval.shape[0] if isinstance(self.primitive, StackedPrimitive) else None

    @property
    def title(self) -> str:
        """The name of the operation, and how many sub-steps of it there are."""
        return title_of(self.primitive, self.y_var)

    @property
    def invars(self) -> list[Atom | _SubStep | None]:
        """Variables of all operands, in order."""
        by_position = dict(self.fixed_vars)
        if self.primitive.x_index is not None:
            by_position[self.primitive.x_index] = self.x_var
        slots = self.primitive.trainables(self.eqn_params)
        by_position |= {slots[k]: v for k, v in self.trainable_vars.items()}
        return [by_position[i] for i in sorted(by_position)]

    @property
    def untrained(self) -> dict[str, int]:
        """Keys of operands that could be trained and are not, and their positions."""
        slots = self.primitive.trainables(self.eqn_params)
        return {k: i for k, i in slots.items() if i in self.fixed_vars}

    @property
    def weight_vars(self) -> dict[str, Atom | _SubStep]:
        """Variables of the trained and the untrained operands, by key."""
        return self.trainable_vars | {k: self.fixed_vars[i] for k, i in self.untrained.items()}

    def x_repr(self, x: PyTree, operands: Mapping[str, jax.Array]) -> PyTree:
        """The representation of the input that the operation is linear in."""
        fixed = {k: self.fixed_vars[i].aval for k, i in self.untrained.items()}
        weights: Mapping[str, PyTree] = {**fixed, **operands}
        return self.primitive.x_repr(x, weights)

    @property
    def one(self) -> HiddenParamOpRelation:
        """The relation with the operation of one sub-step (itself, where there are none)."""
        if not isinstance(self.primitive, StackedPrimitive):
            return self
        return self._replace(
            primitive=self.primitive.one,
            x_var=None if self.x_var is None else _SubStep.of(self.x_var),
            y_var=_SubStep.of(self.y_var),
            fixed_vars={i: _SubStep.of(v) for i, v in self.fixed_vars.items()},
        )

    def fold(self, group: HiddenGroup) -> Fold | None:
        """Where the entries of an output with several for every position of a group act."""
        return group.jacobian.folds.get(self.op_index)

    def place(self, group: HiddenGroup, value: PyTree) -> PyTree:
        """A value per position of a group, for every entry of the output (or of the group, where y is no larger).

        All sub-steps have the same, so that there is no axis for them.
        """
        fold = self.fold(group)
        return value if fold is None else fold.place(value)

    def shape_in(self, group: HiddenGroup) -> Shape:
        """The shape that :meth:`place` gives, with sub-steps in front of it."""
        front = () if self.sub_steps is None else (self.sub_steps,)
        y = self.y_var.aval.shape
        return (*front, *group.varshape) if self.fold(group) is None else y

    @property
    def x(self) -> Atom | _SubStep | None:
        return self.x_var

    @property
    def y(self) -> Var | _SubStep:
        return self.y_var

    @property
    def path(self) -> Path:
        return self.key[0]

    def dict(self) -> dict[str, Any]:
        return self._asdict()

    def __repr__(self) -> str:
        groups = [g.index for g in self.hidden_groups]
        return f"HiddenParamOpRelation({path_str(self.path)!r}, {self.title}, groups={groups})"
