//! Kernels to machine code: NVRTC, loaded when first needed, and a folder of what it made.
//!
//! The sources are part of this program and include no CUDA header, so NVRTC is all that is needed, and neither a driver
//! nor a device. A cubin's name has the hash of all that it was made of (sources, options) and NVRTC's version; a folder
//! that was filled before, by [`build`], serves where there is no NVRTC.

use std::ffi::{CStr, CString, c_char};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use cudarc::nvrtc::{result, sys};
use sha2::{Digest, Sha256};

use super::libraries::Library;

/// The kernels' files, with the headers that they include.
const FILES: [(&str, &str); 13] = [
    ("attention.cu", include_str!("../../csrc/attention.cu")),
    ("dense.cu", include_str!("../../csrc/dense.cu")),
    ("dense_wgmma.cu", include_str!("../../csrc/dense_wgmma.cu")),
    ("embed.cu", include_str!("../../csrc/embed.cu")),
    ("exchange.cu", include_str!("../../csrc/exchange.cu")),
    ("experts.cu", include_str!("../../csrc/experts.cu")),
    ("experts_wgmma.cu", include_str!("../../csrc/experts_wgmma.cu")),
    ("receive.cu", include_str!("../../csrc/receive.cu")),
    ("rms_norm.cu", include_str!("../../csrc/rms_norm.cu")),
    ("rope.cu", include_str!("../../csrc/rope.cu")),
    ("router.cu", include_str!("../../csrc/router.cu")),
    ("sample.cu", include_str!("../../csrc/sample.cu")),
    ("slots.cu", include_str!("../../csrc/slots.cu")),
];
const HEADERS: [(&CStr, &str); 8] = [
    (c"attention_mma.cuh", include_str!("../../csrc/attention_mma.cuh")),
    (c"common.cuh", include_str!("../../csrc/common.cuh")),
    (c"experts.cuh", include_str!("../../csrc/experts.cuh")),
    (c"experts_wgmma.cuh", include_str!("../../csrc/experts_wgmma.cuh")),
    (c"ptx.cuh", include_str!("../../csrc/ptx.cuh")),
    (c"ptx_grid.cuh", include_str!("../../csrc/ptx_grid.cuh")),
    (c"ptx_sm90.cuh", include_str!("../../csrc/ptx_sm90.cuh")),
    (c"ring.cuh", include_str!("../../csrc/ring.cuh")),
];

/// Nothing is fused that the source does not fuse: the emulation's bits are the device's.
const OPTIONS: [&str; 2] = ["--std=c++17", "--fmad=false"];

/// What the kernels are built for: Ampere, Ada, Hopper and Blackwell, with each one's own instructions from sm_90 on.
pub const ARCHS: [&str; 7] = ["80", "86", "89", "90a", "100a", "103a", "120a"];

/// Whether a file of kernels is for this architecture: what needs Hopper's own instructions is for Hopper alone.
fn is_for(file: &str, arch: &str) -> bool {
    !file.ends_with("_wgmma.cu") || arch == "90a"
}

/// The files of kernels that are for this architecture: (name, source).
pub fn files(arch: &str) -> impl Iterator<Item = (&'static str, &'static str)> {
    FILES.into_iter().filter(move |(file, _)| is_for(file, arch))
}

/// Why there is no machine code.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// NVRTC cannot be loaded, and the folder lacks what is needed.
    #[error(
        "no NVRTC (libnvrtc.so.13) on this machine and no {file} for sm_{arch} in {}; install nvidia-cuda-nvrtc 13.0 or \
         point the kernel cache to a folder that was filled by `phalanx kernels build`", folder.display()
    )]
    NoCompiler {
        /// Which kernels.
        file: &'static str,
        /// For what.
        arch: String,
        /// Where they were looked for.
        folder: PathBuf,
    },
    /// NVRTC refused.
    #[error("NVRTC cannot compile {file} for sm_{arch}: {log}; use the NVRTC of CUDA 13.0, or another architecture")]
    Failed {
        /// Which kernels.
        file: String,
        /// For what.
        arch: String,
        /// What NVRTC said.
        log: String,
    },
    /// There is no such file of kernels.
    #[error("no kernels are named {file:?}; name one of the files of csrc")]
    NoFile {
        /// The name.
        file: String,
    },
    /// The folder cannot be written.
    #[error("cannot write {}: {why}; choose another folder for the kernel cache", path.display())]
    Write {
        /// What was to be written.
        path: PathBuf,
        /// The system's reason.
        why: std::io::Error,
    },
}

/// Whether NVRTC can be used.
#[must_use]
pub fn available() -> bool {
    version().is_some()
}

/// NVRTC's version, if there is one that works.
#[must_use]
pub fn version() -> Option<(i32, i32)> {
    Library::Nvrtc.version().ok().map(|version| (version.major, version.minor))
}

/// A folder of machine code.
#[derive(Clone, Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// The cache in `folder`, which need not exist.
    #[must_use]
    pub fn new(folder: &Path) -> Self {
        Self { folder: folder.to_path_buf() }
    }

    /// The machine code of a file of kernels: from the folder, else compiled and kept there. A folder that cannot be
    /// written costs only the next start.
    ///
    /// # Errors
    /// [`CompileError::NoCompiler`], [`CompileError::Failed`], [`CompileError::NoFile`].
    pub fn cubin(&self, file: &str, arch: &str) -> Result<Vec<u8>, CompileError> {
        match self.find_or_make(file, arch) {
            Ok(Made::Kept(cubin)) => Ok(cubin),
            Ok(Made::New(path, cubin)) => {
                // Best effort, as said above.
                let _ = write(&path, &cubin);
                Ok(cubin)
            }
            Err(error) => Err(error),
        }
    }

    /// The machine code of all kernels: (file, code). `on_progress` hears the bytes of source that are done, and all.
    ///
    /// # Errors
    /// Those of [`Cache::cubin`].
    pub fn cubins(
        &self,
        arch: &str,
        on_progress: &mut dyn FnMut(u64, u64),
    ) -> Result<Vec<(&'static str, Vec<u8>)>, CompileError> {
        let total = files(arch).map(|(_, text)| text.len() as u64).sum();
        let mut done = 0;
        let mut cubins = Vec::new();
        on_progress(done, total);
        for (file, text) in files(arch) {
            cubins.push((file, self.cubin(file, arch)?));
            done += text.len() as u64;
            on_progress(done, total);
        }
        Ok(cubins)
    }

    /// Whether all kernels are there, so that nothing needs to be compiled.
    #[must_use]
    pub fn has_all(&self, arch: &str) -> bool {
        files(arch).all(|(file, text)| self.find(file, text, arch).1.is_some())
    }

    /// Where the machine code of a file is or may be, and what is there.
    fn find(&self, file: &str, text: &str, arch: &str) -> (Vec<PathBuf>, Option<Vec<u8>>) {
        let folder = self.folder.join(format!("sm_{arch}"));
        let stem = format!("{}-{}-nvrtc", file.trim_end_matches(".cu"), hash(text, arch));
        let paths = match version() {
            Some((major, minor)) => vec![folder.join(format!("{stem}{major}.{minor}.cubin"))],
            None => named(&folder, &stem),
        };
        let kept = paths.iter().find_map(|path| std::fs::read(path).ok().filter(|bytes| is_cubin(bytes)));
        (paths, kept)
    }

    fn find_or_make(&self, file: &str, arch: &str) -> Result<Made, CompileError> {
        let (file, text) = FILES
            .iter()
            .find(|(name, _)| *name == file)
            .ok_or_else(|| CompileError::NoFile { file: file.to_owned() })?;
        let (kept, cubin) = self.find(file, text, arch);
        if let Some(cubin) = cubin {
            return Ok(Made::Kept(cubin));
        }
        let folder = self.folder.join(format!("sm_{arch}"));
        if !available() {
            return Err(CompileError::NoCompiler { file, arch: arch.to_owned(), folder });
        }
        let cubin = compile(file, text, arch)?;
        let path = kept.into_iter().next().unwrap_or(folder);
        Ok(Made::New(path, cubin))
    }
}

/// Machine code and where it comes from, or goes to.
enum Made {
    Kept(Vec<u8>),
    New(PathBuf, Vec<u8>),
}

/// Something that [`build`] has in the folder now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Built {
    /// The kernels' file.
    pub file: &'static str,
    /// For what.
    pub arch: String,
    /// The machine code.
    pub cubin: Vec<u8>,
}

/// Compiles every kernel for every architecture that it is for into `folder`, as a [`Cache`] finds it. Needs NVRTC, and
/// neither a driver nor a device. `done` is called after each file.
///
/// # Errors
/// [`CompileError`].
pub fn build(archs: &[&str], folder: &Path, mut done: impl FnMut(&Built)) -> Result<Vec<Built>, CompileError> {
    let cache = Cache::new(folder);
    let mut all = Vec::new();
    for arch in archs {
        for (file, _) in files(arch) {
            let cubin = match cache.find_or_make(file, arch)? {
                Made::Kept(cubin) => cubin,
                Made::New(path, cubin) => {
                    write(&path, &cubin).map_err(|why| CompileError::Write { path, why })?;
                    cubin
                }
            };
            let built = Built { file, arch: (*arch).to_owned(), cubin };
            done(&built);
            all.push(built);
        }
    }
    Ok(all)
}

/// The files of a folder whose names begin so.
fn named(folder: &Path, stem: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .filter(|entry| entry.file_name().to_string_lossy().starts_with(stem))
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|ending| ending == "cubin"))
        .collect();
    found.sort();
    found
}

/// Machine code is an ELF file for CUDA (machine 190); anything else in the cache is made anew.
fn is_cubin(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x7fELF") && bytes.get(18..20) == Some(&[190, 0])
}

/// Writes a file that is whole as soon as it has its name.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let unfinished = path.with_extension(format!("{}.tmp", std::process::id()));
    std::fs::write(&unfinished, bytes)?;
    std::fs::rename(&unfinished, path)
}

/// The hash of all that a cubin is made of, but for the compiler.
fn hash(text: &str, arch: &str) -> String {
    let mut hasher = Sha256::new();
    let headers = HEADERS.iter().map(|(_, text)| *text);
    for part in headers.chain([text, arch]).chain(OPTIONS) {
        hasher.update((part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    hasher.finalize().iter().fold(String::new(), |mut hex, byte| {
        write!(hex, "{byte:02x}").expect("strings take everything");
        hex
    })
}

/// A program of NVRTC, destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program was created and is not used afterwards. Nothing can be done about an error.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

/// Compiles a source that may include this program's headers.
///
/// # Errors
/// [`CompileError::Failed`].
pub fn compile(file: &str, text: &str, arch: &str) -> Result<Vec<u8>, CompileError> {
    let failed = |log: String| CompileError::Failed { file: file.to_owned(), arch: arch.to_owned(), log };
    if !available() {
        return Err(failed("it cannot be loaded".to_owned()));
    }
    let said = |error: result::NvrtcError| failed(format!("{error:?}"));
    let zero = |_| failed("a zero in the source".to_owned());
    let source = CString::new(text).map_err(zero)?;
    let name = CString::new(file).map_err(zero)?;
    let headers = HEADERS.map(|(_, text)| CString::new(text));
    let headers = headers.into_iter().collect::<Result<Vec<_>, _>>().map_err(zero)?;
    let header_texts: Vec<*const c_char> = headers.iter().map(|text| text.as_ptr()).collect();
    let header_names: Vec<*const c_char> = HEADERS.iter().map(|(name, _)| name.as_ptr()).collect();
    let mut program = std::ptr::null_mut();
    // SAFETY: NVRTC is present; every string ends with a zero and outlives the program; both arrays have as many
    // pointers as is said.
    let created = unsafe {
        sys::nvrtcCreateProgram(
            &raw mut program,
            source.as_ptr(),
            name.as_ptr(),
            header_texts.len() as i32,
            header_texts.as_ptr(),
            header_names.as_ptr(),
        )
    };
    created.result().map_err(said)?;
    let program = Program(program);
    let mut options = vec![format!("--gpu-architecture=sm_{arch}")];
    options.extend(OPTIONS.map(str::to_owned));
    // SAFETY: the program was just created.
    if let Err(error) = unsafe { result::compile_program(program.0, &options) } {
        // SAFETY: as above; the log of a program that failed to compile may be read.
        let log = unsafe { result::get_program_log(program.0) }.unwrap_or_default();
        let log: Vec<u8> = log.into_iter().map(c_char::cast_unsigned).take_while(|&byte| byte != 0).collect();
        return Err(failed(format!("{error:?}: {}", String::from_utf8_lossy(&log).trim())));
    }
    let mut bytes = 0;
    // SAFETY: the program is compiled, and the number outlives the call.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &raw mut bytes) }.result().map_err(said)?;
    let mut cubin = vec![0u8; bytes];
    // SAFETY: there is room for as many bytes as NVRTC said.
    unsafe { sys::nvrtcGetCUBIN(program.0, cubin.as_mut_ptr().cast()) }.result().map_err(said)?;
    Ok(cubin)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::KERNELS;

    #[test]
    fn every_kernel_is_in_its_file() {
        for kernel in KERNELS {
            let (_, text) = FILES.iter().find(|(file, _)| *file == kernel.file).unwrap();
            let included = |name: &CStr| text.contains(&format!("#include \"{}\"", name.to_str().unwrap()));
            let headers = HEADERS.iter().filter(|(name, _)| included(name)).map(|(_, text)| *text);
            let entry = format!("KERNEL({}, ", kernel.name);
            assert_eq!(headers.chain([*text]).filter(|text| text.contains(&entry)).count(), 1, "{}", kernel.name);
        }
    }

    #[test]
    fn the_hash_is_of_all_that_counts() {
        let one = hash("a", "80");
        assert_eq!(one.len(), 64);
        assert_eq!(one, hash("a", "80"));
        assert!(one != hash("b", "80") && one != hash("a", "86") && hash("a8", "0") != one);
    }

    #[test]
    fn a_damaged_file_is_no_machine_code() {
        let mut cubin = b"\x7fELF".to_vec();
        assert!(!is_cubin(&cubin));
        cubin.resize(64, 0);
        assert!(!is_cubin(&cubin));
        cubin[18] = 190;
        assert!(is_cubin(&cubin));
        assert!(!is_cubin(b""));
    }

    #[test]
    fn what_is_in_the_folder_serves_without_a_compiler() {
        let folder = std::env::temp_dir().join(format!("phalanx-cubins-{}", std::process::id()));
        let cache = Cache::new(&folder);
        let version = version().map_or_else(|| "12.9".to_owned(), |(major, minor)| format!("{major}.{minor}"));
        let rope = FILES.iter().find(|(file, _)| *file == "rope.cu").unwrap().1;
        let path = folder.join(format!("sm_80/rope-{}-nvrtc{version}.cubin", hash(rope, "80")));
        let mut cubin = b"\x7fELF".to_vec();
        cubin.resize(64, 7);
        cubin[18..20].copy_from_slice(&[190, 0]);
        write(&path, &cubin).unwrap();
        assert_eq!(cache.cubin("rope.cu", "80").unwrap(), cubin);
        assert!(matches!(cache.cubin("nothing.cu", "80"), Err(CompileError::NoFile { .. })));
        if !available() {
            assert!(matches!(cache.cubin("rope.cu", "86"), Err(CompileError::NoCompiler { .. })));
            std::fs::write(&path, "damaged").unwrap();
            assert!(cache.cubin("rope.cu", "80").is_err());
        }
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
