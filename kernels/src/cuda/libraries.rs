//! Which CUDA libraries and devices this machine has. Asking never fails where there are none: what is missing is a
//! value that says how to get it.
//!
//! `cudarc` opens libraries at its first call and panics where one is missing or lacks a symbol, so whoever uses it
//! asks here before. Functions are looked up one by one and their results read as plain integers: a driver newer than
//! the bindings may answer with a code that they do not know.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

use libloading::Library as Handle;

use super::Family;
use super::wait::{PATIENCE, within};

/// A library that work on GPUs needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// The driver: memory, streams, launches.
    Driver,
    /// Compiles the kernels.
    Nvrtc,
    /// Dense products, to compare with.
    CublasLt,
    /// Carries rows between GPUs.
    Nccl,
}

impl Library {
    /// Every library, what all others need first.
    pub const ALL: [Self; 4] = [Self::Driver, Self::Nvrtc, Self::CublasLt, Self::Nccl];

    /// The name shown to people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Driver => "CUDA driver",
            Self::Nvrtc => "NVRTC",
            Self::CublasLt => "cuBLASLt",
            Self::Nccl => "NCCL",
        }
    }

    /// Its file, and how one comes by it.
    const fn remedy(self) -> &'static str {
        match self {
            Self::Driver => {
                "no library libcuda.so.1: install NVIDIA's driver, 580 or newer; a container gets the host's with \
                 `--gpus all`"
            }
            Self::Nvrtc => {
                "no library libnvrtc.so.13: `pip install nvidia-cuda-nvrtc` (13.0), and put the folder that holds it \
                 on LD_LIBRARY_PATH"
            }
            Self::CublasLt => {
                "no library libcublasLt.so.13: `pip install nvidia-cublas` (13.0), and put the folder that holds it on \
                 LD_LIBRARY_PATH; only benchmarks use it"
            }
            Self::Nccl => {
                "no library libnccl.so.2: `pip install nvidia-nccl-cu13`, and put the folder that holds it on \
                 LD_LIBRARY_PATH; a link named libnccl.so is not needed"
            }
        }
    }

    /// The library, opened once and for good.
    ///
    /// # Errors
    /// [`Missing::Library`].
    pub fn open(self) -> Result<&'static Handle, Missing> {
        // SAFETY: opening runs a library's initialisers; NVIDIA's are made to be opened at any time, from any thread.
        // `culib` panics where nothing is found, which `is_culib_present` rules out.
        unsafe {
            use cudarc::{cublaslt, driver, nvrtc};
            let found = match self {
                Self::Driver => driver::sys::is_culib_present().then(|| driver::sys::culib()),
                Self::Nvrtc => nvrtc::sys::is_culib_present().then(|| nvrtc::sys::culib()),
                Self::CublasLt => cublaslt::sys::is_culib_present().then(|| cublaslt::sys::culib()),
                Self::Nccl => nccl(),
            };
            found.ok_or(Missing::Library(self))
        }
    }

    /// A function of the library.
    ///
    /// # Errors
    /// The library is missing, or lacks the function.
    ///
    /// # Safety
    /// `F` is the type of a pointer to the C function of this name.
    pub unsafe fn function<F: Copy>(self, name: &'static str) -> Result<F, Missing> {
        // SAFETY: the caller vouches for the type; the library is never closed, so the pointer stays good.
        let found = unsafe { self.open()?.get::<F>(name) };
        found.map(|symbol| *symbol).map_err(|_| Missing::Function { library: self, name })
    }

    /// The version of the library that is there.
    ///
    /// # Errors
    /// The library is missing, or does not say.
    pub fn version(self) -> Result<Version, Missing> {
        type Ask = unsafe extern "C" fn(*mut c_int) -> c_int;
        type AskTwo = unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int;
        let (mut number, mut minor) = (0, 0);
        // SAFETY: the types are those of the C headers, and each function writes the integers it is given.
        unsafe {
            match self {
                Self::Driver => {
                    let ask: Ask = self.function("cuDriverGetVersion")?;
                    answered(self, "cuDriverGetVersion", ask(&mut number))?;
                    Ok(Version { major: number / 1000, minor: number % 1000 / 10, patch: None })
                }
                Self::Nvrtc => {
                    let ask: AskTwo = self.function("nvrtcVersion")?;
                    answered(self, "nvrtcVersion", ask(&mut number, &mut minor))?;
                    Ok(Version { major: number, minor, patch: None })
                }
                Self::CublasLt => {
                    let ask: unsafe extern "C" fn() -> usize = self.function("cublasLtGetVersion")?;
                    Ok(Version::packed(c_int::try_from(ask()).unwrap_or(c_int::MAX)))
                }
                Self::Nccl => {
                    let ask: Ask = self.function("ncclGetVersion")?;
                    answered(self, "ncclGetVersion", ask(&mut number))?;
                    Ok(Version::packed(number))
                }
            }
        }
    }
}

/// NCCL by the name that its packages use. `cudarc` looks for other names only.
///
/// # Safety
/// As for opening any library: its initialisers run.
unsafe fn nccl() -> Option<&'static Handle> {
    static NCCL: OnceLock<Option<Handle>> = OnceLock::new();
    // SAFETY: passed on to the caller.
    let open = |name| unsafe { Handle::new(name) }.ok();
    NCCL.get_or_init(|| ["libnccl.so.2", "libnccl.so"].into_iter().find_map(open)).as_ref()
}

/// A library's version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// Changes when old programs no longer work.
    pub major: c_int,
    /// Changes when something is added.
    pub minor: c_int,
    /// Changes when something is mended; some libraries do not say.
    pub patch: Option<c_int>,
}

impl Version {
    /// From the number that cuBLAS and NCCL (since 2.9) give: 23007 is 2.30.7.
    #[must_use]
    pub const fn packed(number: c_int) -> Self {
        Self { major: number / 10_000, minor: number % 10_000 / 100, patch: Some(number % 100) }
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)?;
        self.patch.map_or(Ok(()), |patch| write!(f, ".{patch}"))
    }
}

/// What this machine lacks for work on GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Missing {
    /// There is no such library where the system looks for libraries.
    #[error("{}", .0.remedy())]
    Library(Library),
    /// The library lacks a function.
    #[error("{} has no function {name}: it is too old or damaged, install a newer one", .library.name())]
    Function {
        /// The library.
        library: Library,
        /// The function.
        name: &'static str,
    },
    /// A function failed.
    #[error("{name} of {} failed with code {code}{}", .library.name(), hint(*.library, *.code))]
    Call {
        /// The library.
        library: Library,
        /// The function.
        name: &'static str,
        /// Its result.
        code: c_int,
    },
    /// The driver does not answer.
    #[error("the CUDA driver does not answer: a GPU hangs; reset it (nvidia-smi --gpu-reset) or restart the machine")]
    Late,
    /// The driver works and finds no device.
    #[error("the CUDA driver finds no GPU: check `nvidia-smi`, and that CUDA_VISIBLE_DEVICES hides none")]
    Devices,
}

const NO_DEVICE: c_int = 100;
const SYSTEM_DRIVER_MISMATCH: c_int = 803;
const STUB_LIBRARY: c_int = 34;

fn hint(library: Library, code: c_int) -> &'static str {
    match (library, code) {
        (Library::Driver, STUB_LIBRARY) => ": libcuda.so.1 is a stub for linking, take its folder off LD_LIBRARY_PATH",
        (Library::Driver, SYSTEM_DRIVER_MISMATCH) => {
            ": libcuda.so.1 and the kernel's driver differ in version, install them together"
        }
        (Library::Driver, _) => ": check that `nvidia-smi` works",
        _ => ": install it anew",
    }
}

fn answered(library: Library, name: &'static str, code: c_int) -> Result<(), Missing> {
    match code {
        0 => Ok(()),
        NO_DEVICE if library == Library::Driver => Err(Missing::Devices),
        code => Err(Missing::Call { library, name, code }),
    }
}

/// A GPU.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gpu {
    /// Its number here, as `CUDA_VISIBLE_DEVICES` leaves it.
    pub index: u32,
    /// Its maker's name for it.
    pub name: String,
    /// Its compute capability, (9, 0) for Hopper.
    pub capability: (u32, u32),
    /// Bytes of its memory.
    pub memory: u64,
    /// Its maker's number for it, the same for every process.
    pub uuid: [u8; 16],
}

impl Gpu {
    /// The architecture that kernels are compiled for on it, `90a` for Hopper.
    #[must_use]
    pub fn arch(&self) -> String {
        super::driver::arch_of(self.signed_capability())
    }

    /// By what it multiplies.
    #[must_use]
    pub fn family(&self) -> Family {
        Family::of(self.signed_capability())
    }

    fn signed_capability(&self) -> (i32, i32) {
        let number = |n| i32::try_from(n).unwrap_or(i32::MAX);
        (number(self.capability.0), number(self.capability.1))
    }

    /// Bytes of its memory that are free. To learn them a context is made on it for a moment.
    ///
    /// # Errors
    /// No context can be made on it.
    pub fn free_memory(&self) -> Result<u64, Missing> {
        let index = c_int::try_from(self.index).unwrap_or(c_int::MAX);
        in_time(move || {
            let driver = Driver::open()?;
            driver.free_memory(driver.device(index)?)
        })
    }
}

/// The GPUs that the driver shows, at least one.
///
/// # Errors
/// There is no driver, it does not work, or it shows no GPU.
pub fn gpus() -> Result<Vec<Gpu>, Missing> {
    in_time(|| {
        let driver = Driver::open()?;
        let mut count = 0;
        // SAFETY: the function writes the integer it is given.
        answered(Library::Driver, "cuDeviceGetCount", unsafe { (driver.device_count)(&mut count) })?;
        if count <= 0 {
            return Err(Missing::Devices);
        }
        (0..count).map(|index| driver.gpu(index)).collect()
    })
}

/// What the driver says, if it says anything: with a GPU that hangs any call may.
fn in_time<T: Send + 'static>(ask: impl FnOnce() -> Result<T, Missing> + Send + 'static) -> Result<T, Missing> {
    within("answer", PATIENCE, ask).unwrap_or(Err(Missing::Late))
}

/// The driver's functions that tell of devices; after `cuInit`.
struct Driver {
    device_count: unsafe extern "C" fn(*mut c_int) -> c_int,
    device: unsafe extern "C" fn(*mut c_int, c_int) -> c_int,
    name: unsafe extern "C" fn(*mut c_char, c_int, c_int) -> c_int,
    attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> c_int,
    total_memory: unsafe extern "C" fn(*mut usize, c_int) -> c_int,
    uuid: unsafe extern "C" fn(*mut [u8; 16], c_int) -> c_int,
    retain: unsafe extern "C" fn(*mut *mut c_void, c_int) -> c_int,
    release: unsafe extern "C" fn(c_int) -> c_int,
    push: unsafe extern "C" fn(*mut c_void) -> c_int,
    pop: unsafe extern "C" fn(*mut *mut c_void) -> c_int,
    memory_info: unsafe extern "C" fn(*mut usize, *mut usize) -> c_int,
}

/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR`; the minor number's follows it.
const CAPABILITY_MAJOR: c_int = 75;
/// Longest name of a device, with its final zero.
const NAME_BYTES: usize = 256;

impl Driver {
    fn open() -> Result<Self, Missing> {
        let library = Library::Driver;
        // SAFETY: the types are those of cuda.h, which names the `_v2` functions by macros.
        unsafe {
            let init: unsafe extern "C" fn(c_uint) -> c_int = library.function("cuInit")?;
            answered(library, "cuInit", init(0))?;
            Ok(Self {
                device_count: library.function("cuDeviceGetCount")?,
                device: library.function("cuDeviceGet")?,
                name: library.function("cuDeviceGetName")?,
                attribute: library.function("cuDeviceGetAttribute")?,
                total_memory: library.function("cuDeviceTotalMem_v2")?,
                uuid: library.function("cuDeviceGetUuid_v2")?,
                retain: library.function("cuDevicePrimaryCtxRetain")?,
                release: library.function("cuDevicePrimaryCtxRelease_v2")?,
                push: library.function("cuCtxPushCurrent_v2")?,
                pop: library.function("cuCtxPopCurrent_v2")?,
                memory_info: library.function("cuMemGetInfo_v2")?,
            })
        }
    }

    fn device(&self, index: c_int) -> Result<c_int, Missing> {
        let mut device = 0;
        // SAFETY: the function writes the integer it is given.
        answered(Library::Driver, "cuDeviceGet", unsafe { (self.device)(&mut device, index) })?;
        Ok(device)
    }

    fn gpu(&self, index: c_int) -> Result<Gpu, Missing> {
        let device = self.device(index)?;
        let (mut major, mut minor, mut memory) = (0, 0, 0);
        let (mut name, mut uuid) = ([0; NAME_BYTES], [0; 16]);
        // SAFETY: each function writes what it is given, a `CUuuid` is 16 bytes, and of the name at most the bytes it is
        // told of are written.
        unsafe {
            let named = (self.name)(name.as_mut_ptr(), NAME_BYTES as c_int - 1, device);
            answered(Library::Driver, "cuDeviceGetName", named)?;
            for (at, number) in (CAPABILITY_MAJOR..).zip([&mut major, &mut minor]) {
                answered(Library::Driver, "cuDeviceGetAttribute", (self.attribute)(number, at, device))?;
            }
            answered(Library::Driver, "cuDeviceTotalMem", (self.total_memory)(&mut memory, device))?;
            answered(Library::Driver, "cuDeviceGetUuid", (self.uuid)(&mut uuid, device))?;
        }
        // SAFETY: the array outlives the reference, and its last byte is zero whatever the driver wrote.
        let name = unsafe { CStr::from_ptr(name.as_ptr()) }.to_string_lossy().into_owned();
        let index = u32::try_from(index).unwrap_or(u32::MAX);
        let capability = (u32::try_from(major).unwrap_or(0), u32::try_from(minor).unwrap_or(0));
        Ok(Gpu { index, name, capability, memory: memory as u64, uuid })
    }

    /// Free bytes, as a context on the device sees them.
    fn free_memory(&self, device: c_int) -> Result<u64, Missing> {
        let call = |name, code| answered(Library::Driver, name, code);
        let (mut context, mut popped) = (std::ptr::null_mut(), std::ptr::null_mut());
        let (mut free, mut total) = (0, 0);
        // SAFETY: the context is current only while it is retained, and released once; each function writes what it
        // is given.
        unsafe {
            call("cuDevicePrimaryCtxRetain", (self.retain)(&mut context, device))?;
            let known = call("cuCtxPushCurrent", (self.push)(context)).and_then(|()| {
                let known = call("cuMemGetInfo", (self.memory_info)(&mut free, &mut total));
                call("cuCtxPopCurrent", (self.pop)(&mut popped)).and(known)
            });
            call("cuDevicePrimaryCtxRelease", (self.release)(device)).and(known)?;
        }
        Ok(free as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_their_makers_write_them() {
        assert_eq!(Version::packed(23_007).to_string(), "2.30.7");
        assert_eq!(Version::packed(130_100).to_string(), "13.1.0");
        assert!(Version::packed(22_809) < Version::packed(23_003));
        assert_eq!(Version { major: 13, minor: 0, patch: None }.to_string(), "13.0");
    }

    #[test]
    fn asking_fails_nowhere() {
        for library in Library::ALL {
            match library.version() {
                Ok(version) => assert!(version.major > 0, "{}: {version}", library.name()),
                Err(missing) => assert!(missing.to_string().contains("install"), "{missing}"),
            }
        }
        if let Ok(gpus) = gpus() {
            assert!(!gpus.is_empty() && gpus.iter().all(|gpu| gpu.capability.0 > 0), "{gpus:?}");
        }
    }

    #[test]
    fn a_failed_call_says_what_to_do() {
        assert_eq!(answered(Library::Driver, "cuInit", 0), Ok(()));
        assert_eq!(answered(Library::Driver, "cuInit", NO_DEVICE), Err(Missing::Devices));
        let stub = answered(Library::Driver, "cuInit", STUB_LIBRARY).unwrap_err().to_string();
        assert!(stub.contains("cuInit") && stub.contains("LD_LIBRARY_PATH"), "{stub}");
    }
}
