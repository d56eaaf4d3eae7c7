"""Descriptions of NVIDIA GPUs for compiling without one, in the text format that XLA reads (GpuTargetConfigProto)."""

from dataclasses import dataclass

from tttlm.training.devices import Device


@dataclass(frozen=True)
class GPU:
    """The figures of an SXM module's data sheet that its compute capability does not determine.

    Attributes:
        processors: number of streaming multiprocessors.
        clock_ghz: boost clock in GHz.
        bandwidth: memory bandwidth in bytes per second.
        l2_cache: size of the L2 cache in bytes.
    """

    processors: int
    clock_ghz: float
    bandwidth: int
    l2_cache: int


MIB = 2**20
GPUS = {
    "h100": GPU(processors=132, clock_ghz=1.98, bandwidth=3_350 * 10**9, l2_cache=50 * MIB),
    "h200": GPU(processors=132, clock_ghz=1.98, bandwidth=4_800 * 10**9, l2_cache=50 * MIB),
}
CUDA, CUDNN = (12, 9, 0), (9, 10, 0)  # versions that the program is compiled for; any later release runs it

# Limits of compute capability 9.0: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability".
_HOPPER = """
  cuda_compute_capability { major: 9 minor: 0 feature_extension: ACCELERATED_FEATURES }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_core: 233472
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  fpus_per_core: 128
"""


def target_config(device: Device) -> str:
    """The description of a device of `GPUS`."""
    gpu = GPUS[device.name]
    cuda, cudnn = (".".join(map(str, version)) for version in (CUDA, CUDNN))
    name = f"NVIDIA {device.name.upper()}"
    return f"""gpu_device_info {{
  name: "{name}"
  device_vendor: "NVIDIA Corporation"{_HOPPER}
  core_count: {gpu.processors}
  clock_rate_ghz: {gpu.clock_ghz}
  device_memory_size: {device.memory}
  memory_bandwidth: {gpu.bandwidth}
  l2_cache_size: {gpu.l2_cache}
  device_address_bits: 64
  driver_version: "{cuda}"
  runtime_version: "{cuda}"
  compile_time_toolkit_version: "{cuda}"
  dnn_version: "{cudnn}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN[0]} minor: {CUDNN[1]} patch: {CUDNN[2]} }}
device_description_str: "{name}"
"""
