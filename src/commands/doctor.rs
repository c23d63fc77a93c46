//! `phalanx doctor`: what this machine offers, what is missing, and how to get it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Result;
use clap::Args;
use phalanx_kernels::Isa;
use phalanx_kernels::cuda::libraries::{Gpu, Library, Missing, Version};
use phalanx_model::checkpoint::hub_cache;
use phalanx_worker::device::{
    Choice, DeviceError, DeviceRequest, Probe, choose_device, cores, kernel_cache, memory_available,
};
use serde_json::{Value, json};

use crate::commands::{mib, say, say_json};

/// Arguments of `doctor`.
#[derive(Debug, Args)]
pub struct DoctorArgs {
    /// What should compute; the exit code says whether it can
    #[arg(long, env = "PHALANX_DEVICE", value_name = "DEVICE", default_value_t)]
    device: DeviceRequest,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Runs `phalanx doctor`.
///
/// # Errors
/// The reader of the output is gone. Exit code 1 if the device asked for cannot be used.
pub fn run(args: &DoctorArgs) -> Result<ExitCode> {
    let probe = Probe::take();
    let chosen = choose_device(args.device, || probe.clone());
    let machine = Machine::look(probe);
    if args.json {
        say_json(&machine.json(&chosen))?;
    } else {
        machine.print(&chosen)?;
    }
    Ok(if chosen.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// What there is.
struct Machine {
    cpu: Option<String>,
    /// Level, such as `L2`, and bytes.
    cpu_caches: Vec<(String, u64)>,
    memory: u64,
    libraries: Vec<(Library, Result<Version, Missing>)>,
    probe: Probe,
    models: Option<PathBuf>,
    /// Where compiled kernels are kept, and how many files of them.
    kernels: Option<(PathBuf, usize)>,
}

impl Machine {
    fn look(probe: Probe) -> Self {
        Self {
            cpu: cpu_model(),
            cpu_caches: cpu_caches(Path::new("/sys/devices/system/cpu/cpu0/cache")),
            memory: memory_available().0,
            libraries: Library::ALL.map(|library| (library, library.version())).into(),
            probe,
            models: hub_cache().filter(|path| path.is_dir()),
            kernels: kernel_cache().map(|folder| {
                let kept = cubins(&folder);
                (folder, kept)
            }),
        }
    }

    fn gpus(&self) -> &[Gpu] {
        self.probe.gpus.as_deref().unwrap_or_default()
    }

    fn json(&self, chosen: &Result<Choice, DeviceError>) -> Value {
        let libraries = self.libraries.iter().map(|(library, version)| {
            let value = match version {
                Ok(version) => json!({"version": version.to_string()}),
                Err(missing) => json!({"missing": missing.to_string()}),
            };
            (library.name().to_owned(), value)
        });
        let gpus = self.gpus().iter().map(|gpu| {
            json!({
                "index": gpu.index, "name": gpu.name, "compute_capability": capability(gpu),
                "memory_bytes": gpu.memory, "free_bytes": gpu.free_memory().ok(),
            })
        });
        let caches = self.cpu_caches.iter().map(|(level, bytes)| (level.clone(), json!(bytes)));
        json!({
            "version": phalanx_wire::VERSION,
            "cpu": {
                "model": self.cpu, "cores": cores(), "cache_bytes": caches.collect::<serde_json::Map<_, _>>(),
                "instruction_sets": Isa::available().into_iter().map(Isa::name).collect::<Vec<_>>(),
                "instruction_set": Isa::detect().name(),
            },
            "memory": {"available_bytes": self.memory},
            "cuda": {
                "libraries": libraries.collect::<serde_json::Map<_, _>>(),
                "gpus": gpus.collect::<Vec<_>>(),
                "missing": self.probe.gpus.as_ref().err().map(ToString::to_string),
            },
            "models": self.models,
            "kernels": self.kernels.as_ref().map(|(folder, kept)| json!({"folder": folder, "cubins": kept})),
            "device": match chosen {
                Ok(choice) => json!({"chosen": choice.processor.to_string(), "why": choice.why}),
                Err(error) => json!({"asked": error.asked.to_string(), "missing": error.lacks}),
            },
        })
    }

    fn print(&self, chosen: &Result<Choice, DeviceError>) -> Result<()> {
        let line = |what: &str, text: &str| say(format_args!("{what:<14}{text}"));
        line("phalanx", phalanx_wire::VERSION)?;
        line("processor", &format!("{}, {} cores", self.cpu.as_deref().unwrap_or("unknown"), cores()))?;
        let sets: Vec<&str> = Isa::available().into_iter().map(Isa::name).collect();
        line("instructions", &format!("{} (has {})", Isa::detect().name(), sets.join(", ")))?;
        let caches = self.cpu_caches.iter().map(|(level, bytes)| format!("{level} {} KiB", bytes >> 10));
        let caches = caches.collect::<Vec<_>>().join(", ");
        line("caches", if caches.is_empty() { "unknown" } else { &caches })?;
        line("memory", &format!("{:.1} GiB available", mib(self.memory) / 1024.0))?;
        match &self.models {
            Some(path) => line("models", &format!("Hugging Face cache in {}", path.display()))?,
            None => line("models", "no Hugging Face cache; give --model a directory, or take nano")?,
        }
        for (library, version) in &self.libraries {
            match version {
                Ok(version) => line(library.name(), &version.to_string())?,
                Err(missing) => line(library.name(), &missing.to_string())?,
            }
        }
        for gpu in self.gpus() {
            let free =
                gpu.free_memory().map_or_else(|why| why.to_string(), |free| format!("{:.0} MiB free", mib(free)));
            let text =
                format!("{}, compute capability {}, {:.0} MiB, {free}", gpu.name, capability(gpu), mib(gpu.memory));
            line(&format!("GPU {}", gpu.index), &text)?;
        }
        if let (Ok(_), Err(missing)) = (&self.libraries[0].1, &self.probe.gpus) {
            line("GPUs", &missing.to_string())?;
        }
        match &self.kernels {
            Some((folder, 0)) => line("kernels", &format!("none are compiled yet in {}", folder.display()))?,
            Some((folder, kept)) => line("kernels", &format!("{kept} files compiled, in {}", folder.display()))?,
            None => line("kernels", "no folder to keep compiled ones in: set PHALANX_KERNEL_CACHE")?,
        }
        match chosen {
            Ok(choice) => say(format_args!("\n{choice}")),
            Err(error) => say(format_args!("\n{error}")),
        }
    }
}

fn capability(gpu: &Gpu) -> String {
    format!("{}.{}", gpu.capability.0, gpu.capability.1)
}

/// Files of machine code in a cache of kernels, which has a folder for each architecture.
fn cubins(cache: &Path) -> usize {
    let entries = |folder: &Path| std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let files = entries(cache).flat_map(|arch| entries(&arch));
    files.filter(|file| file.extension().is_some_and(|ending| ending == "cubin")).count()
}

/// The processor's name; the system tells it on some architectures only.
fn cpu_model() -> Option<String> {
    let text = std::fs::read_to_string("/proc/cpuinfo").ok()?;
    let line = text.lines().find(|line| line.starts_with("model name"))?;
    Some(line.split_once(':')?.1.trim().to_owned())
}

/// The caches of the first core for data, by level.
fn cpu_caches(folder: &Path) -> Vec<(String, u64)> {
    let mut found = Vec::new();
    for index in 0..8 {
        let read = |name: &str| std::fs::read_to_string(folder.join(format!("index{index}")).join(name)).ok();
        let (Some(level), Some(kind), Some(size)) = (read("level"), read("type"), read("size")) else { continue };
        let kib = size.trim().strip_suffix('K').and_then(|kib| kib.parse::<u64>().ok());
        if let Some(kib) = kib.filter(|_| kind.trim() != "Instruction") {
            found.push((format!("L{}", level.trim()), kib << 10));
        }
    }
    found
}
