"""Online learning of recurrent and spiking neural networks with eligibility traces, on JAX."""

from typing import Any as _Any

from . import nn as nn
from ._checkpoint import load as load
from ._checkpoint import load_state_dict as load_state_dict
from ._checkpoint import save as save
from ._checkpoint import state_dict as state_dict
from ._compare import compare as compare
from ._comparison import Comparison as Comparison
from ._compile import compile as compile
from ._compiler.diagnostics import CompilationRecord as CompilationRecord
from ._compiler.diagnostics import DiagnosticKind as DiagnosticKind
from ._compiler.diagnostics import DiagnosticLevel as DiagnosticLevel
from ._compiler.executor import ETraceGraphExecutor as ETraceGraphExecutor
from ._compiler.graph import ETraceGraph as ETraceGraph
from ._compiler.graph import compile_etrace_graph as compile_etrace_graph
from ._compiler.groups import HiddenGroup as HiddenGroup
from ._compiler.module_info import ModuleInfo as ModuleInfo
from ._compiler.module_info import extract_module_info as extract_module_info
from ._compiler.policy import ControlFlowPolicy as ControlFlowPolicy
from ._compiler.relations import HiddenParamOpRelation as HiddenParamOpRelation
from ._compiler.report import CompilationReport as CompilationReport
from ._layout import shard as shard
from ._learners.base import EligibilityTrace as EligibilityTrace
from ._learners.base import ETraceAlgorithm as ETraceAlgorithm
from ._learners.bootstrap import DNI as DNI
from ._learners.bootstrap import SyntheticGradient as SyntheticGradient
from ._learners.bootstrap import train_synthetic_gradient as train_synthetic_gradient
from ._learners.config import ETraceConfig as ETraceConfig
from ._learners.hybrid_dim import HybridDimVjpAlgorithm as HybridDimVjpAlgorithm
from ._learners.io_dim import ES_D_RTRL as ES_D_RTRL
from ._learners.io_dim import IODimVjpAlgorithm as IODimVjpAlgorithm
from ._learners.io_dim import pp_prop as pp_prop
from ._learners.param_dim import ParamDimVjpAlgorithm as ParamDimVjpAlgorithm
from ._learners.parts import FixedRandomFeedback as FixedRandomFeedback
from ._learners.parts import GradExpon as GradExpon
from ._learners.parts import KappaFilter as KappaFilter
from ._learners.projection import UORO as UORO
from ._learners.projection import RandomProjectionVjpAlgorithm as RandomProjectionVjpAlgorithm
from ._learners.rules import D_RTRL as D_RTRL
from ._learners.rules import EProp as EProp
from ._learners.rules import Immediate as Immediate
from ._learners.rules import OSTLFeedforward as OSTLFeedforward
from ._learners.rules import OSTLRecurrent as OSTLRecurrent
from ._learners.rules import SnAp as SnAp
from ._learners.rules import ThreeFactor as ThreeFactor
from ._learners.vjp import ETraceVjpAlgorithm as ETraceVjpAlgorithm
from ._legacy.executor import ETraceVjpGraphExecutor as ETraceVjpGraphExecutor
from ._legacy.finders import find_hidden_groups_from_minfo as find_hidden_groups_from_minfo
from ._legacy.finders import find_hidden_groups_from_module as find_hidden_groups_from_module
from ._legacy.finders import find_hidden_param_op_relations_from_minfo as find_hidden_param_op_relations_from_minfo
from ._legacy.finders import find_hidden_param_op_relations_from_module as find_hidden_param_op_relations_from_module
from ._legacy.perturbation import HiddenPerturbation as HiddenPerturbation
from ._legacy.perturbation import add_hidden_perturbation_from_minfo as add_hidden_perturbation_from_minfo
from ._legacy.perturbation import add_hidden_perturbation_in_module as add_hidden_perturbation_in_module
from ._mapped import ETraceVmap as ETraceVmap
from ._ops import ETPPrimitive as ETPPrimitive
from ._ops import columns_in_parts as columns_in_parts
from ._ops import conv as conv
from ._ops import einsum as einsum
from ._ops import element_wise as element_wise
from ._ops import embedding as embedding
from ._ops import grouped_matmul as grouped_matmul
from ._ops import lora_matmul as lora_matmul
from ._ops import matmul as matmul
from ._ops import register_primitive as register_primitive
from ._ops import sparse_matmul as sparse_matmul
from ._sequence import SequenceDriverMixin as SequenceDriverMixin
from ._types import CompilationError as CompilationError
from ._types import CompilationWarning as CompilationWarning
from ._types import MultiStepData as MultiStepData
from ._types import NotSupportedError as NotSupportedError
from ._types import SingleStepData as SingleStepData

__version__ = "1.0.0b1"
__version_info__ = tuple(map(int, __version__.partition("b")[0].split(".")))

__all__ = [
    "CompilationError",
    "CompilationRecord",
    "CompilationReport",
    "CompilationWarning",
    "Comparison",
    "ControlFlowPolicy",
    "DNI",
    "D_RTRL",
    "DiagnosticKind",
    "DiagnosticLevel",
    "EProp",
    "ES_D_RTRL",
    "ETPPrimitive",
    "ETraceAlgorithm",
    "ETraceConfig",
    "ETraceGraph",
    "ETraceGraphExecutor",
    "ETraceVjpAlgorithm",
    "ETraceVjpGraphExecutor",
    "ETraceVmap",
    "EligibilityTrace",
    "FixedRandomFeedback",
    "GradExpon",
    "HiddenGroup",
    "HiddenParamOpRelation",
    "HiddenPerturbation",
    "HybridDimVjpAlgorithm",
    "IODimVjpAlgorithm",
    "Immediate",
    "KappaFilter",
    "ModuleInfo",
    "MultiStepData",
    "NotSupportedError",
    "OSTLFeedforward",
    "OSTLRecurrent",
    "ParamDimVjpAlgorithm",
    "RandomProjectionVjpAlgorithm",
    "SequenceDriverMixin",
    "SingleStepData",
    "SnAp",
    "SyntheticGradient",
    "ThreeFactor",
    "UORO",
    "__version__",
    "__version_info__",
    "add_hidden_perturbation_from_minfo",
    "add_hidden_perturbation_in_module",
    "columns_in_parts",
    "compare",
    "compile",
    "compile_etrace_graph",
    "conv",
    "einsum",
    "element_wise",
    "embedding",
    "extract_module_info",
    "find_hidden_groups_from_minfo",
    "find_hidden_groups_from_module",
    "find_hidden_param_op_relations_from_minfo",
    "find_hidden_param_op_relations_from_module",
    "grouped_matmul",
    "load",
    "load_state_dict",
    "lora_matmul",
    "matmul",
    "nn",
    "pp_prop",
    "register_primitive",
    "save",
    "shard",
    "sparse_matmul",
    "state_dict",
    "train_synthetic_gradient",
]

_DEPRECATED = (
    "ConvOp",
    "ETraceOp",
    "ETraceParam",
    "ElemWiseOp",
    "ElemWiseParam",
    "FakeETraceParam",
    "FakeElemWiseParam",
    "LoraOp",
    "MatMulOp",
    "NonTempParam",
    "SpMatMulOp",
)

_GONE = {
    "ETraceState": "Use brainstate.HiddenState.",
    "ETraceGroupState": "Use brainstate.HiddenGroupState.",
    "ETraceTreeState": "Use brainstate.HiddenTreeState.",
    "stop_param_gradients": "Differentiate by the parameters that you train only, or use jax.lax.stop_gradient.",
}


def __getattr__(name: str) -> _Any:
    if name not in _DEPRECATED:
        gone = f"; version 0.1 had it. {_GONE[name]}" if name in _GONE else ""
        raise AttributeError(f"module 'braintrace' has no attribute {name!r}{gone}")
    from ._legacy.operations import forward

    return forward(name)


def __dir__() -> list[str]:
    return sorted([*__all__, *_DEPRECATED])
