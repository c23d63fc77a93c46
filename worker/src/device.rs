//! What this machine offers a worker, and how a worker's backend is made.

mod choice;
mod gpus;
pub(crate) mod scratch;

use std::path::PathBuf;

use phalanx_kernels::cpu::{Cpu, CpuOptions, Isa};
use phalanx_kernels::cuda::{Cuda, GRAPH_BYTES};
use phalanx_kernels::{DenseFormat, KernelError, Precision as KernelPrecision};
use phalanx_model::Checkpoint;
use phalanx_proto::memory::INT8_BLOCK_BYTES;
use phalanx_proto::{BackendReport, Bytes, DenseType, NumericsId, Peers, Precision, Scratch};

pub use choice::{Choice, DeviceError, DeviceRequest, Probe, Processor, choose_device};
pub use gpus::{DriverGpus, GpuReport, Gpus};

use crate::collectives::nccl::{ExchangeRequest, LIBRARY_BYTES, SLOTS_BYTES_MAX};
use crate::process::memory_pool;

/// Memory of a worker process before it holds anything.
const PROCESS_BASE: Bytes = Bytes(24 << 20);
/// Memory of a GPU that the driver takes for a process beside what is allocated: its context, the kernels' code, graphs.
const GPU_PROCESS_BASE: Bytes = Bytes((512 << 20) + GRAPH_BYTES);
/// A small buffer or two beside slots.
const PORT_BYTES: u64 = 4 << 10;

/// How a worker computes.
#[derive(Clone, Copy, Debug)]
pub struct Device {
    /// What the workers of this machine compute on.
    pub processor: Processor,
    /// How much is rounded on the way.
    pub precision: Precision,
    /// How projections are held.
    pub dense: DenseType,
    /// Threads that compute, on CPUs.
    pub threads: u32,
    /// Binds them to cores, from the one of this number on among those that the process may use.
    pub pin: Option<u32>,
    /// Keeps packed weights in a file for the next start.
    pub weight_cache: bool,
    /// The instruction set, or the best there is.
    pub isa: Option<Isa>,
    /// Where GPUs come from.
    pub gpus: &'static dyn Gpus,
    /// What carries rows between GPUs.
    pub exchange: ExchangeRequest,
}

impl Device {
    /// The backend on CPUs, whatever else was chosen.
    ///
    /// # Errors
    /// The threads cannot be started, or the processor lacks the instruction set.
    pub fn cpu(&self) -> Result<Cpu, KernelError> {
        let dense = match self.dense {
            DenseType::Bf16 => DenseFormat::Bf16,
            DenseType::Q8 => DenseFormat::Q8,
        };
        Cpu::new(CpuOptions {
            precision: self.kernel_precision(),
            dense,
            threads: self.threads as usize,
            pin: self.pin.map(|first| first as usize),
            isa: self.isa,
        })
    }

    /// The backend on the GPU that was chosen. `on_progress` hears the bytes of kernels that are compiled, and all.
    ///
    /// # Errors
    /// The GPU cannot be used, or none was chosen.
    pub fn cuda(&self, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Cuda, KernelError> {
        let Processor::Cuda { first, .. } = self.processor else {
            return Err(KernelError::Processor { processor: "cuda" });
        };
        Cuda::new(self.gpus.open(first, on_progress)?, self.kernel_precision())
    }

    const fn kernel_precision(&self) -> KernelPrecision {
        match self.precision {
            Precision::Exact => KernelPrecision::Exact,
            Precision::Fast => KernelPrecision::Fast,
        }
    }

    /// The device of one of several workers of a machine: each has cores of its own, and GPUs are taken in turn.
    #[must_use]
    pub fn of(&self, worker: u32) -> Self {
        let processor = self.processor.of_worker(worker);
        Self {
            processor,
            pin: self.pin.map(|first| first.saturating_add(worker.saturating_mul(self.threads))),
            ..*self
        }
    }

    /// What a coordinator must know of the device before it computes.
    ///
    /// # Errors
    /// The GPU does not answer.
    pub fn look(&self, checkpoint: &Checkpoint) -> Result<DeviceReport, KernelError> {
        let float_bytes = match self.precision {
            Precision::Exact => 4,
            Precision::Fast => 2,
        };
        let report = BackendReport {
            tile_rows: 16,
            dense_block_bytes: match self.dense {
                DenseType::Bf16 => 64,
                DenseType::Q8 => 34,
            },
            mxfp4_block_bytes: 17,
            kv_bytes: float_bytes,
            wire_bytes: float_bytes,
            operand_block_bytes: match self.precision {
                Precision::Exact => 128,
                Precision::Fast => INT8_BLOCK_BYTES,
            },
            item_tile: 0,
            scratch: Scratch::default(),
            peers: Peers::default(),
            threads: self.threads,
            process_base: PROCESS_BASE,
            embedding_mapped: checkpoint.embedding_mapped(),
            memory: memory_available(),
        };
        let numerics =
            |family: &str, kv: &str| NumericsId::new(phalanx_kernels::VERSION, family, self.precision, self.dense, kv);
        match self.processor {
            Processor::Cpu => {
                Ok(DeviceReport { numerics: numerics("cpu", "f16"), backend: report, memory_pool: memory_pool() })
            }
            Processor::Cuda { first, .. } => {
                let GpuReport { arch, family, free, memory_pool } = self.gpus.look(first)?;
                let backend = BackendReport {
                    operand_block_bytes: 32 * float_bytes,
                    item_tile: if self.precision == Precision::Fast { family.item_tile() } else { 0 },
                    scratch: scratch::gpu_scratch(checkpoint.config()),
                    peers: match self.exchange {
                        ExchangeRequest::Tcp => Peers { library: Bytes(0), slots: Bytes(PORT_BYTES) },
                        ExchangeRequest::Auto | ExchangeRequest::Nccl | ExchangeRequest::NcclGraphs => {
                            Peers { library: Bytes(LIBRARY_BYTES), slots: Bytes(SLOTS_BYTES_MAX as u64 + PORT_BYTES) }
                        }
                    },
                    process_base: GPU_PROCESS_BASE,
                    threads: 1,
                    embedding_mapped: false,
                    memory: free,
                    ..report
                };
                Ok(DeviceReport { numerics: numerics(&format!("cuda-sm{arch}"), "bf16"), backend, memory_pool })
            }
        }
    }
}

/// What a device is, for the coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DeviceReport {
    /// Which bits it computes.
    pub numerics: NumericsId,
    /// Sizes of the backend's formats, and its memory.
    pub backend: BackendReport,
    /// Names the memory: the same for all workers that share it.
    pub memory_pool: String,
}

/// Where machine code of GPU kernels is kept: `PHALANX_KERNEL_CACHE`, else `phalanx/kernels` in the user's cache
/// folder. `None` where the system names no such folder.
#[must_use]
pub fn kernel_cache() -> Option<PathBuf> {
    let path = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let cache = || path("XDG_CACHE_HOME").or_else(|| Some(path("HOME")?.join(".cache")));
    path("PHALANX_KERNEL_CACHE").or_else(|| Some(cache()?.join("phalanx/kernels")))
}

/// Cores that this process may use.
#[must_use]
pub fn cores() -> u32 {
    std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(u32::MAX))
}

/// Memory that this process may use: what the system has available, or what its control group allows.
#[must_use]
pub fn memory_available() -> Bytes {
    let kib_of = |text: &str, key: &str| {
        let line = text.lines().find(|line| line.starts_with(key))?;
        line.split_whitespace().nth(1)?.parse::<u64>().ok()
    };
    let system = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| kib_of(&text, "MemAvailable:"));
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok().and_then(|text| text.trim().parse().ok());
    Bytes(system.map_or(u64::MAX, |kib| kib.saturating_mul(1024)).min(group.unwrap_or(u64::MAX)))
}

/// The largest memory this process has held, in bytes; 0 where the system does not say.
#[must_use]
pub fn memory_peak() -> Bytes {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|line| line.starts_with("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().nth(1)).and_then(|n| n.parse::<u64>().ok());
    Bytes(kib.unwrap_or(0) * 1024)
}
