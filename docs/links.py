"""Code spans that name something public become links.

They lead into this reference, or into that of another package. What is linked to elsewhere is listed here, as the
inventories of the other sites cannot be fetched where there is no network.
"""

import inspect
import pydoc
import re
import zlib

from docutils import nodes
from sphinx import addnodes
from sphinx.transforms import SphinxTransform

import braintrace

# Site, page of a name, names. Where pages have no addresses that we know, the search of the site finds the name.
CHAOBRAIN, SEARCH = "https://brainx.chaobrain.com/", "search.html?q={}"
ELSEWHERE = {
    "jax": (
        "https://docs.jax.dev/en/latest/",
        "_autosummary/{0}.html#{0}",
        "jax.Array jax.ShapeDtypeStruct jax.checkpoint jax.custom_jvp jax.custom_vjp jax.default_device "
        "jax.default_matmul_precision jax.device_put jax.devices jax.distributed.initialize jax.grad jax.jit "
        "jax.lax.ConvDimensionNumbers jax.lax.conv_general_dilated jax.lax.scan jax.lax.stop_gradient jax.make_jaxpr "
        "jax.shard_map jax.vjp jax.vmap",
    ),
    "brainstate": (
        f"{CHAOBRAIN}brainstate/",
        SEARCH,
        "brainstate.HiddenGroupState brainstate.HiddenState brainstate.HiddenTreeState brainstate.LongTermState "
        "brainstate.ParamState brainstate.ShortTermState brainstate.State brainstate.environ brainstate.graph.clone "
        "brainstate.nn brainstate.nn.Map brainstate.nn.Module brainstate.nn.Sequential brainstate.nn.Vmap "
        "brainstate.nn.init_all_states brainstate.nn.reset_all_states brainstate.random.seed brainstate.transform.grad "
        "brainstate.transform.jit brainstate.transform.scan brainstate.transform.shard_map brainstate.transform.vmap "
        "brainstate.transform.vmap_new_states",
    ),
    "brainunit": (f"{CHAOBRAIN}brainunit/", SEARCH, "brainunit.Quantity brainunit.get_mantissa brainunit.sparse"),
    "brainpy": (
        f"{CHAOBRAIN}brainpy-state/",
        SEARCH,
        "brainpy.state brainpy.state.ALIF brainpy.state.AlignPostProj brainpy.state.COBA brainpy.state.CUBA "
        "brainpy.state.Expon brainpy.state.LIF",
    ),
    "braintools": (f"{CHAOBRAIN}braintools/", SEARCH, "braintools.init braintools.optim braintools.surrogate"),
}


def inventories(folder):
    """Write an inventory of each other site into `folder`, and return what `intersphinx_mapping` takes."""
    folder.mkdir(parents=True, exist_ok=True)
    mapping = {}
    for project, (site, page, names) in ELSEWHERE.items():
        lines = [f"{name} py:{kind(name)} 1 {page.format(name)} -\n" for name in names.split()]
        head = f"# Sphinx inventory version 2\n# Project: {project}\n# Version:\n# compressed with zlib\n"
        path = folder / f"{project}.inv"
        path.write_bytes(head.encode() + zlib.compress("".join(lines).encode()))
        mapping[project] = (site, str(path))
    return mapping


def kind(name):
    found = pydoc.locate(name)
    if found is None:
        raise LookupError(f"{name} is in no installed package.")
    return "module" if inspect.ismodule(found) else "class" if inspect.isclass(found) else "function"


PUBLIC = {}  # what a code span may say -> full name
for module in (braintrace.nn, braintrace):
    for name in module.__all__:
        full = f"{module.__name__}.{name}"
        PUBLIC |= {full: full, f"{name}()": full}
        if re.search("[A-Z_]", name):  # a word such as `save` may mean something else
            PUBLIC[name] = full
        if module is braintrace.nn:
            PUBLIC[f"nn.{name}"] = full
for cls, members in {
    "SequenceDriverMixin": "etrace_grad etrace_evolve",
    "ETraceVjpAlgorithm": "reset_state config modulator",
    "ETraceAlgorithm": "compile_graph init_etrace_state graph report show_graph param_states hidden_states",
}.items():
    for name in members.split():
        PUBLIC[f"learner.{name}"] = full = f"braintrace.{cls}.{name}"
        if name in ("etrace_grad", "etrace_evolve", "compile_graph", "init_etrace_state", "show_graph"):
            PUBLIC[name] = full
PUBLIC |= {name: name for *_, names in ELSEWHERE.values() for name in names.split()}


def target_of(code):
    name, called, _ = code.partition("(")
    if called and f"{name}()" in PUBLIC:
        return PUBLIC[f"{name}()"]
    first, dot, member = name.partition(".")
    if first in PUBLIC and dot:  # `ETraceGraph.explain`
        return f"{PUBLIC[first]}.{member}"
    return PUBLIC.get(name)


class LinkCode(SphinxTransform):
    default_priority = 400

    def apply(self, **kwargs):
        no_links = (nodes.reference, nodes.title, addnodes.pending_xref, addnodes.desc_signature)
        for node in list(self.document.findall(nodes.literal)):
            parents = []
            while (parent := (parents[-1] if parents else node).parent) is not None:
                parents.append(parent)
            own = {i for p in parents if isinstance(p, addnodes.desc) for i in p[0].get("ids", ())}
            target = target_of(node.astext())
            if target and target not in own and not any(isinstance(p, no_links) for p in parents):
                link = addnodes.pending_xref("", refdomain="py", reftype="obj", reftarget=target, refwarn=False)
                node.replace_self(link)
                link += node


def setup(app):
    app.add_transform(LinkCode)
    return {"parallel_read_safe": True}
