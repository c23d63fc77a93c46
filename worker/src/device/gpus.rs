//! The GPUs that workers compute on: this machine's, or what a test puts in their place.

use std::fmt;
use std::sync::Arc;

use phalanx_kernels::KernelError;
use phalanx_kernels::cuda::compile::Cache;
use phalanx_kernels::cuda::driver::Driver;
use phalanx_kernels::cuda::{self, Family, libraries};
use phalanx_proto::Bytes;

use super::kernel_cache;

/// What a worker must know of its GPU before it computes on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GpuReport {
    /// The architecture that its kernels are compiled for, `90a` for Hopper: other ones may compute other bits.
    pub arch: String,
    /// By what it multiplies.
    pub family: Family,
    /// Free memory.
    pub free: Bytes,
    /// Names its memory: the same for all processes of a machine.
    pub memory_pool: String,
}

/// Where GPUs come from.
pub trait Gpus: fmt::Debug + Send + Sync {
    /// Looks at the GPU of this number.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn look(&self, index: u32) -> Result<GpuReport, KernelError>;

    /// Opens the GPU of this number. `on_progress` hears the bytes of kernels that are compiled, and all.
    ///
    /// # Errors
    /// [`KernelError::Device`].
    fn open(&self, index: u32, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Arc<dyn cuda::Device>, KernelError>;
}

/// The GPUs that the driver shows.
#[derive(Debug)]
pub struct DriverGpus;

impl Gpus for DriverGpus {
    fn look(&self, index: u32) -> Result<GpuReport, KernelError> {
        let refused = |missing: libraries::Missing| KernelError::Device { what: "be used", why: missing.to_string() };
        let gpus = libraries::gpus().map_err(refused)?;
        let gpu = gpus.get(index as usize).ok_or_else(|| refused(libraries::Missing::Devices))?;
        let uuid: String = gpu.uuid.iter().map(|byte| format!("{byte:02x}")).collect();
        let free = Bytes(gpu.free_memory().map_err(refused)?);
        Ok(GpuReport { arch: gpu.arch(), family: gpu.family(), free, memory_pool: format!("gpu/{uuid}") })
    }

    fn open(&self, index: u32, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Arc<dyn cuda::Device>, KernelError> {
        let folder = kernel_cache().ok_or_else(|| KernelError::Device {
            what: "get its kernels",
            why: "there is no folder for them, set PHALANX_KERNEL_CACHE to one".to_owned(),
        })?;
        Ok(Arc::new(Driver::open(index as usize, &Cache::new(&folder), on_progress)?))
    }
}
