from igstore.acceleration import convolutions as convolutions
from igstore.acceleration.accelerator import accelerate as accelerate
from igstore.acceleration.guard import is_out_of_memory as is_out_of_memory
from igstore.acceleration.lines.integral import OnLines as OnLines
from igstore.acceleration.stem import Hoisted as Hoisted, hoist_stem as hoist_stem
