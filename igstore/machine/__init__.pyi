from igstore.machine.compiled import kernels_allowed as kernels_allowed
from igstore.machine.devices import (
    device_name as device_name,
    find_device as find_device,
    find_devices as find_devices,
    runtime as runtime,
    versions as versions,
)
from igstore.machine.freed_memory import freed_memory_kept as freed_memory_kept, keep_freed_memory as keep_freed_memory
from igstore.machine.limits import free_memory as free_memory, usable_cores as usable_cores
from igstore.machine.torch_settings import fresh_torch as fresh_torch
from igstore.machine.transfer import one_behind as one_behind, to_device as to_device, to_host as to_host
