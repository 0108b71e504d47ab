from .linear import dense as dense
from .linear import matmul as matmul
from .pointwise import element_wise as element_wise
from .primitive import ETPPrimitive as ETPPrimitive
from .primitive import register_primitive as register_primitive
