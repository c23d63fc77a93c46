//! On which processor a worker computes: what was asked for, what there is, and what follows.

use std::fmt;
use std::str::FromStr;

use phalanx_kernels::cuda::compile::Cache;
use phalanx_kernels::cuda::libraries::{Gpu, Library, Missing, Version, gpus};

use super::kernel_cache;

/// The oldest compute capability with the instructions that the kernels need.
const CAPABILITY_MIN: (u32, u32) = (8, 0);

/// What a user asks for: `auto`, `cpu`, `cuda` or `cuda:N`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceRequest {
    /// GPUs where they can be used, else CPUs.
    #[default]
    Auto,
    /// CPUs.
    Cpu,
    /// All GPUs, or the one with this number; nothing else will do.
    Cuda(Option<u32>),
}

impl FromStr for DeviceRequest {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match (text, text.strip_prefix("cuda:").map(str::parse)) {
            ("auto", _) => Ok(Self::Auto),
            ("cpu", _) => Ok(Self::Cpu),
            ("cuda", _) => Ok(Self::Cuda(None)),
            (_, Some(Ok(index))) => Ok(Self::Cuda(Some(index))),
            _ => Err("give auto, cpu, cuda, or cuda:N with the number of a GPU".to_owned()),
        }
    }
}

impl fmt::Display for DeviceRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(None) => f.write_str("cuda"),
            Self::Cuda(Some(index)) => write!(f, "cuda:{index}"),
        }
    }
}

/// What the workers of this machine compute on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Processor {
    /// CPUs.
    Cpu,
    /// GPUs `first` to `first + count - 1`, taken in turn.
    Cuda {
        /// The first.
        first: u32,
        /// How many, at least 1.
        count: u32,
    },
}

impl Processor {
    /// What one worker of this machine computes on.
    #[must_use]
    pub const fn of_worker(self, worker: u32) -> Self {
        match self {
            Self::Cpu => Self::Cpu,
            Self::Cuda { first, count } => Self::Cuda { first: first + worker % count, count: 1 },
        }
    }
}

/// As in `--device`.
impl fmt::Display for Processor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda { first, count: 1 } => write!(f, "cuda:{first}"),
            Self::Cuda { .. } => f.write_str("cuda"),
        }
    }
}

/// What this machine and this build have for work on GPUs.
#[derive(Clone, Debug)]
pub struct Probe {
    /// The GPUs, at least one.
    pub gpus: Result<Vec<Gpu>, Missing>,
    /// What compiles the kernels.
    pub compiler: Result<Version, Missing>,
    /// The GPUs whose kernels are compiled already, by number.
    pub compiled: Vec<u32>,
}

impl Probe {
    /// Asks this machine.
    #[must_use]
    pub fn take() -> Self {
        let (gpus, cache) = (gpus(), kernel_cache().map(|folder| Cache::new(&folder)));
        let has_all = |gpu: &&Gpu| cache.as_ref().is_some_and(|cache| cache.has_all(&gpu.arch()));
        let compiled = gpus.iter().flatten().filter(has_all).map(|gpu| gpu.index).collect();
        Self { gpus, compiler: Library::Nvrtc.version(), compiled }
    }
}

/// What is computed on, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Choice {
    /// What.
    pub processor: Processor,
    /// Why, in a few words.
    pub why: String,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "computes on {}: {}", self.processor, self.why)
    }
}

/// Why a device cannot be used: everything that is missing at once, so that it can be mended at once.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("--device {asked} cannot be used: {}; or give --device cpu", .lacks.join("; "))]
pub struct DeviceError {
    /// What was asked for.
    pub asked: DeviceRequest,
    /// What is missing and how to get it, at least one.
    pub lacks: Vec<String>,
}

/// What to compute on. Where CPUs are asked for, nothing is asked of the machine: a driver takes time and memory to
/// answer.
///
/// # Errors
/// GPUs are asked for and cannot be used.
pub fn choose_device(asked: DeviceRequest, probe: impl FnOnce() -> Probe) -> Result<Choice, DeviceError> {
    let cpu = |why: String| Choice { processor: Processor::Cpu, why };
    let index = match asked {
        DeviceRequest::Cpu => return Ok(cpu("as asked".to_owned())),
        DeviceRequest::Auto => None,
        DeviceRequest::Cuda(index) => index,
    };
    match (cuda(index, &probe()), asked) {
        (Ok(choice), _) => Ok(choice),
        (Err(lacks), DeviceRequest::Auto) => {
            let first = lacks.into_iter().next().map_or_else(String::new, |lack| lack.in_short);
            Ok(cpu(format!("{first} (`phalanx doctor` says more)")))
        }
        (Err(lacks), _) => Err(DeviceError { asked, lacks: lacks.into_iter().map(|lack| lack.remedy).collect() }),
    }
}

/// Something that keeps GPUs from being used.
struct Lack {
    in_short: String,
    remedy: String,
}

/// All GPUs or the one asked for, or everything that keeps them from being used.
fn cuda(index: Option<u32>, probe: &Probe) -> Result<Choice, Vec<Lack>> {
    let mut lacks = Vec::new();
    let mut lack = |in_short: String, remedy: String| lacks.push(Lack { in_short, remedy });
    let mut chosen: &[Gpu] = &[];
    match &probe.gpus {
        Err(missing) => lack(in_short(missing), missing.to_string()),
        Ok(gpus) => {
            chosen = gpus;
            if let Some(index) = index {
                chosen = gpus.get(index as usize).map_or(&[], std::slice::from_ref);
                if chosen.is_empty() {
                    let remedy =
                        format!("there is no GPU {index}, the driver shows {}: number them from 0", gpus.len());
                    lack(format!("there is no GPU {index}"), remedy);
                }
            }
        }
    }
    for gpu in chosen.iter().filter(|gpu| gpu.capability < CAPABILITY_MIN) {
        let (Gpu { index, name, capability: (major, minor), .. }, (least, least_minor)) = (gpu, CAPABILITY_MIN);
        let in_short = format!("GPU {index} ({name}) is too old");
        lack(
            in_short.clone(),
            format!(
                "{in_short}: its compute capability is {major}.{minor}, {least}.{least_minor} is the least; leave it \
                 out by CUDA_VISIBLE_DEVICES"
            ),
        );
    }
    // Kernels that are compiled already need no compiler.
    let uncompiled = chosen.iter().find(|gpu| !probe.compiled.contains(&gpu.index));
    if let Err(missing) = &probe.compiler
        && (chosen.is_empty() || uncompiled.is_some())
    {
        let of = uncompiled.map_or_else(String::new, |gpu| format!(" for GPU {} (sm_{})", gpu.index, gpu.arch()));
        lack(
            in_short(missing),
            format!("{missing}; nor are there compiled kernels{of}, as `phalanx kernels build` makes them"),
        );
    }
    match chosen {
        [gpu, ..] if lacks.is_empty() => {
            let (first, count) = (gpu.index, u32::try_from(chosen.len()).unwrap_or(1));
            let others = if count > 1 { format!(" and {} more", count - 1) } else { String::new() };
            Ok(Choice { processor: Processor::Cuda { first, count }, why: format!("{}{others}", gpu.name) })
        }
        _ => Err(lacks),
    }
}

fn in_short(missing: &Missing) -> String {
    match missing {
        Missing::Library(library) => format!("there is no {}", library.name()),
        Missing::Function { library, .. } | Missing::Call { library, .. } => {
            format!("{} does not work", library.name())
        }
        Missing::Late => "the CUDA driver does not answer".to_owned(),
        Missing::Devices => "the CUDA driver finds no GPU".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn gpu(index: u32, capability: (u32, u32)) -> Gpu {
        Gpu { index, name: "NVIDIA H100".to_owned(), capability, memory: 80 << 30, uuid: [0; 16] }
    }

    /// Two good GPUs and all that is needed.
    fn good() -> Probe {
        let compiler = Ok(Version { major: 13, minor: 0, patch: None });
        Probe { gpus: Ok(vec![gpu(0, (9, 0)), gpu(1, (9, 0))]), compiler, compiled: Vec::new() }
    }

    fn nothing() -> Probe {
        let compiler = Err(Missing::Library(Library::Nvrtc));
        Probe { gpus: Err(Missing::Library(Library::Driver)), compiler, compiled: Vec::new() }
    }

    const ALL: DeviceRequest = DeviceRequest::Cuda(None);

    #[test]
    fn what_is_asked_for_is_read_and_shown_alike() {
        for text in ["auto", "cpu", "cuda", "cuda:0", "cuda:7"] {
            assert_eq!(text.parse::<DeviceRequest>().unwrap().to_string(), text);
        }
        for text in ["", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:4294967296", "CPU"] {
            assert!(text.parse::<DeviceRequest>().unwrap_err().contains("cuda:N"), "{text}");
        }
    }

    #[test]
    fn where_all_is_there_gpus_are_taken() {
        for asked in [DeviceRequest::Auto, ALL] {
            let choice = choose_device(asked, good).unwrap();
            assert_eq!(choice.processor, Processor::Cuda { first: 0, count: 2 });
            assert_eq!(choice.to_string(), "computes on cuda: NVIDIA H100 and 1 more");
        }
        let one = choose_device(DeviceRequest::Cuda(Some(1)), good).unwrap();
        assert_eq!(one.to_string(), "computes on cuda:1: NVIDIA H100");
        let oldest = || Probe { gpus: Ok(vec![gpu(0, CAPABILITY_MIN)]), ..good() };
        assert!(choose_device(ALL, oldest).is_ok());
        assert_eq!(choose_device(DeviceRequest::Cpu, || panic!("nobody asked")).unwrap().processor, Processor::Cpu);
    }

    #[test]
    fn workers_take_the_gpus_in_turn() {
        let both = Processor::Cuda { first: 2, count: 2 };
        assert_eq!([0, 1, 2].map(|i| both.of_worker(i).to_string()), ["cuda:2", "cuda:3", "cuda:2"]);
        assert_eq!(Processor::Cpu.of_worker(3), Processor::Cpu);
    }

    #[test]
    fn whatever_is_missing_auto_computes_on_cpus_and_says_why() {
        let cases: [(Probe, &str); 6] = [
            (nothing(), "there is no CUDA driver"),
            (Probe { gpus: Err(Missing::Devices), ..good() }, "finds no GPU"),
            (Probe { gpus: Err(Missing::Late), ..good() }, "does not answer"),
            (Probe { gpus: Ok(vec![gpu(0, (7, 5))]), ..good() }, "GPU 0 (NVIDIA H100) is too old"),
            (Probe { compiler: Err(Missing::Library(Library::Nvrtc)), ..good() }, "there is no NVRTC"),
            (
                Probe { gpus: Err(Missing::Call { library: Library::Driver, name: "cuInit", code: 999 }), ..good() },
                "CUDA driver does not work",
            ),
        ];
        for (probe, why) in cases {
            let choice = choose_device(DeviceRequest::Auto, || probe.clone()).unwrap();
            assert_eq!(choice.processor, Processor::Cpu);
            assert!(choice.why.contains(why) && choice.why.contains("doctor"), "{choice}");
            let error = choose_device(ALL, || probe.clone()).unwrap_err();
            assert!(!error.lacks.is_empty() && error.to_string().contains("--device cpu"), "{error}");
        }
    }

    #[test]
    fn compiled_kernels_need_no_compiler() {
        let compiler = || Err(Missing::Library(Library::Nvrtc));
        let one = || Probe { compiler: compiler(), compiled: vec![1], ..good() };
        assert!(choose_device(DeviceRequest::Cuda(Some(1)), one).is_ok());
        let error = choose_device(ALL, one).unwrap_err().to_string();
        assert!(error.contains("libnvrtc.so.13") && error.contains("compiled kernels for GPU 0 (sm_90a)"), "{error}");
        let both = || Probe { compiler: compiler(), compiled: vec![0, 1], ..good() };
        assert_eq!(choose_device(ALL, both).unwrap().processor, Processor::Cuda { first: 0, count: 2 });
    }

    #[test]
    fn all_that_is_missing_is_said_at_once() {
        let error = choose_device(ALL, nothing).unwrap_err().to_string();
        for words in ["libcuda.so.1", "libnvrtc.so.13", "compiled kernels"] {
            assert!(error.contains(words), "{words}: {error}");
        }
        let error = choose_device(DeviceRequest::Cuda(Some(2)), good).unwrap_err().to_string();
        assert!(error.contains("--device cuda:2") && error.contains("no GPU 2, the driver shows 2"), "{error}");
    }
}
