//! A GPU behind the CUDA driver, which is loaded when first needed.

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::path::Path;
use std::sync::Arc;

use cudarc::driver::{CudaContext, DriverError, result, sys};

use super::capture::StreamCapture;
use super::choose::SHARED_MAX;
use super::compile::Cache;
use super::device::{Captured, Device, Family, Graph, Launch, Pinned};
use super::graph::Chain;
use super::ops::KERNELS;
use super::page_locked::PageLocked;
use super::sequence::Sequence;
use super::stream::{Left, Stream};
use super::wait::{PATIENCE, within};
use crate::KernelError;

const DYNAMIC_SHARED: sys::CUfunction_attribute =
    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
const CARVEOUT: sys::CUfunction_attribute =
    sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT;
const SHARED_OPTIN: sys::CUdevice_attribute =
    sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;

/// A loaded file of kernels.
struct Module(sys::CUmodule);

/// A GPU and one stream on it.
pub struct Driver {
    stream: Arc<Stream>,
    arch: String,
    family: Family,
    multiprocessors: u32,
    functions: HashMap<&'static str, sys::CUfunction>,
    modules: Vec<Module>,
}

// SAFETY: modules and functions belong to the context, not to a thread; the driver allows their use from any thread on
// which the context is current, and every method makes it current first.
unsafe impl Send for Driver {}
// SAFETY: as above; the driver's calls may be made from several threads at once.
unsafe impl Sync for Driver {}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Driver").field("stream", &self.stream).field("arch", &self.arch).finish_non_exhaustive()
    }
}

pub(super) fn failed(what: &'static str) -> impl Fn(DriverError) -> KernelError {
    move |error| KernelError::Device { what, why: error.to_string() }
}

/// The architecture to compile for: with its own instructions where the kernels may use them.
pub(super) fn arch_of((major, minor): (i32, i32)) -> String {
    let own = if matches!((major, minor), (9, 0) | (10, 0 | 3) | (12, 0)) { "a" } else { "" };
    format!("{major}{minor}{own}")
}

/// GPUs of this machine; `None` where there is no CUDA driver.
#[must_use]
pub fn devices() -> Option<usize> {
    // SAFETY: looks for the library by its names and loads it; its initialisers are trusted like any system library's.
    if !unsafe { sys::is_culib_present() } {
        return None;
    }
    CudaContext::device_count().ok().and_then(|count| usize::try_from(count).ok())
}

/// Memory that is given back stays with this process: buffers of a step come and go.
fn keep_freed_memory(context: &CudaContext) -> Result<(), DriverError> {
    if !context.has_async_alloc() {
        return Ok(());
    }
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is the context's; the attribute is an u64, which outlives the call.
    unsafe {
        let pool = result::device::get_default_mem_pool(context.cu_device())?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast())
    }
}

impl Driver {
    /// The GPU of this number, with kernels from `cache` or compiled; `on_progress` as in [`Cache::cubins`].
    ///
    /// # Errors
    /// [`KernelError::Device`]: no driver, no such GPU, or no kernels for it.
    pub fn open(ordinal: usize, cache: &Cache, on_progress: &mut dyn FnMut(u64, u64)) -> Result<Self, KernelError> {
        // Of a device that hangs the system's part of the driver may not even give a context.
        let mut driver = within("open", PATIENCE, move || Self::without_kernels(ordinal))??;
        driver.load(cache, on_progress)?;
        Ok(driver)
    }

    fn without_kernels(ordinal: usize) -> Result<Self, KernelError> {
        let refused = |why: String| KernelError::Device { what: "be used", why };
        let count = devices().ok_or_else(|| refused("there is no CUDA driver (libcuda.so.1)".to_owned()))?;
        if ordinal >= count {
            return Err(refused(format!("GPU {ordinal} was asked for and there are {count}")));
        }
        let open = failed("be opened");
        let context = CudaContext::new(ordinal).map_err(&open)?;
        let capability = context.compute_capability().map_err(&open)?;
        let multiprocessors =
            context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).map_err(&open)?;
        keep_freed_memory(&context).map_err(&open)?;
        Ok(Self {
            stream: Arc::new(Stream::new(context).map_err(&open)?),
            arch: arch_of(capability),
            family: Family::of(capability),
            multiprocessors: u32::try_from(multiprocessors).unwrap_or(1).max(1),
            functions: HashMap::new(),
            modules: Vec::new(),
        })
    }

    /// The architecture its kernels are compiled for.
    #[must_use]
    pub fn arch(&self) -> &str {
        &self.arch
    }

    /// The same GPU with the kernels of another family: those of [`Family::Mma`] run on every device.
    #[must_use]
    pub fn restricted_to(mut self, family: Family) -> Self {
        if family == Family::Mma {
            self.family = family;
        }
        self
    }

    fn load(&mut self, cache: &Cache, on_progress: &mut dyn FnMut(u64, u64)) -> Result<(), KernelError> {
        let cubins = cache
            .cubins(&self.arch, on_progress)
            .map_err(|error| KernelError::Device { what: "get its kernels", why: error.to_string() })?;
        // A kernel has 48 KiB unless it is allowed more: what the device has, and no kernel wants more than the constant.
        let load = failed("load its kernels");
        let shared = self.stream.context().attribute(SHARED_OPTIN).map_err(&load)?.min(SHARED_MAX as i32);
        // The context was made on another thread.
        self.bind()?;
        for (file, cubin) in cubins {
            // SAFETY: the context is current on this thread; the image is an ELF file, which says its
            // own size, and is copied by the driver.
            let module = unsafe { result::module::load_data(cubin.as_ptr().cast()) }.map_err(&load)?;
            self.modules.push(Module(module));
            for kernel in KERNELS.iter().filter(|kernel| kernel.file == file) {
                let name = CString::new(kernel.name).expect("names of kernels have no zero");
                // SAFETY: the module was just loaded.
                let function = unsafe { result::module::get_function(module, name) }.map_err(&load)?;
                // SAFETY: the function was just found; no kernel has shared memory beside the dynamic one.
                unsafe { result::function::set_function_attribute(function, DYNAMIC_SHARED, shared) }.map_err(&load)?;
                // As many blocks as registers allow, and a multiprocessor is not cut anew between kernels.
                // SAFETY: the function was just found; it is a hint, in hundredths of what the device has at most.
                unsafe { result::function::set_function_attribute(function, CARVEOUT, 100) }.map_err(&load)?;
                self.functions.insert(kernel.name, function);
            }
        }
        Ok(())
    }

    /// The function of a launch with as many bytes of arguments.
    fn function(&self, launch: &Launch<'_>, args_bytes: usize) -> Result<sys::CUfunction, KernelError> {
        let kernel = launch.kernel;
        let function = self.functions.get(kernel.name).filter(|_| kernel.args_bytes == args_bytes);
        function.copied().ok_or_else(|| KernelError::Device {
            what: "run a kernel",
            why: format!("{} with {args_bytes} bytes of arguments is none of its kernels", kernel.name),
        })
    }

    /// Makes the context current on this thread.
    fn bind(&self) -> Result<(), KernelError> {
        self.stream.bind().map_err(failed("be reached"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.stream.is_over() {
            for module in self.modules.drain(..) {
                // SAFETY: the module was loaded by `load`, and all launches of its functions are done. Nothing can be done
                // about an error here; the context's end frees all.
                let _ = unsafe { result::module::unload(module.0) };
            }
        }
    }
}

impl Device for Driver {
    fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    fn family(&self) -> Family {
        self.family
    }

    fn allocate(&self, bytes: usize) -> Result<u64, KernelError> {
        self.bind()?;
        // SAFETY: the stream belongs to the context, which is current; memory is written before it is read, by `zero`.
        let allocated = unsafe {
            if self.stream.context().has_async_alloc() {
                result::malloc_async(self.stream.raw(), bytes)
            } else {
                result::malloc_sync(bytes)
            }
        };
        allocated.map_err(|error| KernelError::Device { what: "allocate", why: format!("{bytes} bytes: {error}") })
    }

    unsafe fn free(&self, address: u64, _bytes: usize) {
        if !self.stream.context().has_async_alloc() {
            // Without a stream's order the driver would wait for the device before it frees.
            self.stream.leave(Left::Device(address));
            self.stream.sweep();
        } else if self.bind().is_ok() {
            // SAFETY: the caller promises that this is an allocation and not used again. Nothing can be done about an error.
            let _ = unsafe { result::free_async(address, self.stream.raw()) };
        }
    }

    unsafe fn upload(&self, from: &[u8], to: u64) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the caller promises that the destination is allocated. The source is ordinary memory, which the
        // driver has read, or staged, when this returns.
        unsafe { result::memcpy_htod_async(to, from, self.stream.raw()) }.map_err(failed("take bytes"))
    }

    unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the caller promises that the source is allocated; the copy is done when this returns.
        unsafe { result::memcpy_dtoh_sync(to, from) }.map_err(failed("give bytes"))
    }

    unsafe fn copy(&self, from: u64, to: u64, bytes: usize) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the caller promises that both are allocated and apart.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.raw()) }.map_err(failed("copy"))
    }

    unsafe fn zero(&self, to: u64, bytes: usize) -> Result<(), KernelError> {
        self.bind()?;
        // SAFETY: the caller promises that the destination is allocated.
        unsafe { result::memset_d8_async(to, 0, bytes, self.stream.raw()) }.map_err(failed("set bytes"))
    }

    unsafe fn launch(&self, launch: Launch<'_>, args: *const c_void, args_bytes: usize) -> Result<(), KernelError> {
        self.bind()?;
        let function = self.function(&launch, args_bytes)?;
        let (kernel, [x, y, z]) = (launch.kernel, launch.grid);
        // SAFETY: the caller promises that the one argument is the kernel's struct, which the driver copies, and that
        // all it points to is allocated.
        let launched = unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (kernel.threads, 1, 1),
                launch.shared,
                self.stream.raw(),
                &mut [args.cast_mut()],
            )
        };
        launched.map_err(|error| KernelError::Device { what: "run a kernel", why: format!("{}: {error}", kernel.name) })
    }

    fn graph(&self, nodes: &Sequence) -> Result<Box<dyn Graph>, KernelError> {
        let function = |launch: &Launch<'_>, args_bytes| self.function(launch, args_bytes);
        let list = std::env::var("PHALANX_AHEAD").unwrap_or_default();
        let ahead = move |name: &str| list == "all" || list.split(',').any(|one| !one.is_empty() && name.starts_with(one));
        Ok(Box::new(Chain::new(&self.stream, nodes, ahead, function)?))
    }

    fn capture(
        &self,
        enqueue: &mut dyn FnMut(*mut c_void) -> Result<(), KernelError>,
    ) -> Result<Captured, KernelError> {
        Ok(Captured::new(StreamCapture::new(&self.stream, enqueue)?))
    }

    fn pin(&self, bytes: usize) -> Result<Box<dyn Pinned>, KernelError> {
        Ok(Box::new(PageLocked::new(&self.stream, bytes)?))
    }

    fn is_idle(&self) -> Result<bool, KernelError> {
        self.stream.is_idle()
    }

    fn stream(&self) -> Result<*mut c_void, KernelError> {
        self.bind()?;
        Ok(self.stream.raw().cast())
    }

    fn free_memory(&self) -> Option<u64> {
        self.bind().ok()?;
        result::mem_get_info().ok().map(|(free, _)| free as u64)
    }

    fn uuid(&self) -> Result<[u8; 16], KernelError> {
        let uuid = self.stream.context().uuid().map_err(failed("say which it is"))?;
        Ok(uuid.bytes.map(|byte| byte.to_ne_bytes()[0]))
    }
}

/// A backend on the GPU of this number, with kernels from `folder` or compiled into it.
///
/// # Errors
/// [`KernelError::Device`].
pub fn open(ordinal: usize, folder: &Path, precision: crate::Precision) -> Result<super::Cuda, KernelError> {
    let driver = Driver::open(ordinal, &Cache::new(folder), &mut |_, _| ())?;
    super::Cuda::new(Arc::new(driver), precision)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn architectures_have_their_own_instructions_where_kernels_may_use_them() {
        let archs = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1)].map(arch_of);
        assert_eq!(archs, ["80", "86", "89", "90a", "100a", "103a", "120a", "121"]);
    }

    #[test]
    fn a_machine_without_a_driver_says_so() {
        if devices().is_none() {
            let error = Driver::open(0, &Cache::new(Path::new("unused")), &mut |_, _| ()).unwrap_err().to_string();
            assert!(error.contains("no CUDA driver"), "{error}");
        }
    }
}
