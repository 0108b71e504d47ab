"""Signatures of constructors as the reference shows them."""

import ast
import inspect
import re
import textwrap


class Verbatim(str):
    __repr__ = str.__str__


def default_in_source(function, name):
    arguments = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].args
    positional = [*arguments.posonlyargs, *arguments.args][::-1]
    pairs = [*zip(positional, arguments.defaults[::-1]), *zip(arguments.kwonlyargs, arguments.kw_defaults)]
    return ast.unparse(next(default for argument, default in pairs if argument.arg == name))


def readable_default(function, name, value):
    """A default value that a signature shows well: objects as the source makes them, without the module of a class."""
    if value is inspect.Parameter.empty or isinstance(value, (bool, float, int, str, tuple, type(None))):
        return value
    if isinstance(value, type):
        return Verbatim(value.__name__)
    return Verbatim(re.sub(r"\b(\w+\.)+(?=[A-Z])", "", default_in_source(function, name)))


def init_signature(cls):
    """That of the constructor, which the metaclasses of modules and states hide; None for a class that has none."""
    if cls.__init__ is object.__init__ or issubclass(cls, tuple):
        return None
    _, *parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = [readable_default(cls.__init__, p.name, p.default) for p in parameters]
    plain = [p.replace(annotation=p.empty, default=default) for p, default in zip(parameters, defaults)]
    return inspect.Signature(plain)
