//! What this machine offers a worker, and how a worker's backend is made.

mod choice;

use std::path::PathBuf;

use phalanx_kernels::cpu::{Cpu, CpuOptions, Isa};
use phalanx_kernels::{DenseFormat, KernelError, Precision as KernelPrecision};
use phalanx_model::packed::PackedFile;
use phalanx_model::{Checkpoint, LoadError};
use phalanx_proto::{BackendReport, Bytes, DenseType, NumericsId, Precision};

pub use choice::{Choice, DeviceError, DeviceRequest, Probe, Processor, choose_device};

use crate::weight_cache;

/// Memory of a worker process before it holds anything.
const PROCESS_BASE: Bytes = Bytes(24 << 20);

/// How a worker computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Device {
    /// What the workers of this machine compute on.
    pub processor: Processor,
    /// How much is rounded on the way.
    pub precision: Precision,
    /// How projections are held.
    pub dense: DenseType,
    /// Threads that compute.
    pub threads: u32,
    /// Binds them to cores, from the one of this number on among those that the process may use.
    pub pin: Option<u32>,
    /// Keeps packed weights in a file for the next start.
    pub weight_cache: bool,
    /// The instruction set, or the best there is.
    pub isa: Option<Isa>,
}

impl Device {
    /// Makes the backend.
    ///
    /// # Errors
    /// The threads cannot be started, the processor lacks the instruction set, or this build has no backend for it.
    pub fn backend(&self) -> Result<Cpu, KernelError> {
        if let Processor::Cuda { .. } = self.processor {
            return Err(KernelError::Processor { processor: "cuda" });
        }
        let precision = match self.precision {
            Precision::Exact => KernelPrecision::Exact,
            Precision::Fast => KernelPrecision::Fast,
        };
        let dense = match self.dense {
            DenseType::Bf16 => DenseFormat::Bf16,
            DenseType::Q8 => DenseFormat::Q8,
        };
        Cpu::new(CpuOptions {
            precision,
            dense,
            threads: self.threads as usize,
            pin: self.pin.map(|first| first as usize),
            isa: self.isa,
        })
    }

    /// The packed weights of a checkpoint, if they are kept; see [`crate::weight_cache`].
    ///
    /// # Errors
    /// The checkpoint is at fault.
    pub fn packed(
        &self,
        backend: &mut Cpu,
        checkpoint: &Checkpoint,
        on_progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Option<PackedFile>, LoadError> {
        if self.weight_cache { weight_cache::packed(backend, checkpoint, on_progress) } else { Ok(None) }
    }

    /// The device of one of several workers of a machine: each has cores of its own.
    #[must_use]
    pub fn of(&self, worker: u32) -> Self {
        Self { pin: self.pin.map(|first| first.saturating_add(worker.saturating_mul(self.threads))), ..*self }
    }

    /// Which bits this device computes.
    #[must_use]
    pub fn numerics(&self) -> NumericsId {
        NumericsId::new(phalanx_kernels::VERSION, "cpu", self.precision, self.dense)
    }

    /// Sizes of the backend's formats, and its memory.
    #[must_use]
    pub fn report(&self, checkpoint: &Checkpoint) -> BackendReport {
        let float_bytes = match self.precision {
            Precision::Exact => 4,
            Precision::Fast => 2,
        };
        BackendReport {
            tile_rows: 16,
            dense_block_bytes: match self.dense {
                DenseType::Bf16 => 64,
                DenseType::Q8 => 34,
            },
            mxfp4_block_bytes: 17,
            kv_bytes: float_bytes,
            wire_bytes: float_bytes,
            threads: self.threads,
            process_base: PROCESS_BASE,
            embedding_mapped: checkpoint.embedding_mapped(),
            memory: memory_available(),
        }
    }
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
