//! What the machine is, what it can at most, and how busy it was with other things.

use std::path::Path;
use std::process::Command;

use super::json::{Json, member};
use crate::report::Outcome;
use crate::run::run;

/// MiB read at once: beyond any cache.
const READ_MIB: u32 = 1024;
const READ_REPEATS: u32 = 5;
/// Linux counts processor time in hundredths of a second, whatever the kernel's own tick.
const TICKS_PER_SECOND: f64 = 100.0;

/// Builds the program that reads memory.
pub(crate) fn build_membw(source: &Path, program: &Path) -> Result<(), String> {
    let mut compile = Command::new("cc");
    compile.args(["-O3", "-march=native", "-pthread", "-o"]).arg(program).arg(source);
    match run(&mut compile) {
        Outcome::Passed(_) => Ok(()),
        Outcome::Failed(why) | Outcome::NotRun(why) => {
            Err(format!("cannot compile {}: {why}; install a C compiler (Debian: build-essential)", source.display()))
        }
    }
}

/// GB/s at which so many threads read memory: the best of a few passes, since a ceiling is asked for.
pub(crate) fn read_gb_s(program: &Path, threads: u32) -> Result<f64, String> {
    let arguments = [threads, READ_MIB, READ_REPEATS].map(|n| n.to_string());
    let output = Command::new(program).args(arguments).output();
    let output = output.map_err(|error| format!("{}: {error}", program.display()))?;
    let best = best_of(&String::from_utf8_lossy(&output.stdout));
    best.filter(|_| output.status.success())
        .ok_or_else(|| format!("{} ended with {}: is there 1 GiB of free memory?", program.display(), output.status))
}

fn best_of(lines: &str) -> Option<f64> {
    let speeds: Option<Vec<f64>> = lines.lines().map(|line| line.trim().parse().ok()).collect();
    speeds?.into_iter().filter(|speed| *speed > 0.0).reduce(f64::max)
}

/// Processor time of the whole machine so far, in seconds over all cores.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Ticks {
    busy: f64,
    total: f64,
}

impl Ticks {
    pub(crate) fn now() -> Ticks {
        let stat = std::fs::read_to_string("/proc/stat").unwrap_or_default();
        Ticks::from_stat(&stat).unwrap_or(Ticks { busy: 0.0, total: 0.0 })
    }

    /// From the first line of `/proc/stat`; time stolen by other guests of the host counts as busy.
    fn from_stat(stat: &str) -> Option<Ticks> {
        let line = stat.lines().next()?.strip_prefix("cpu ")?;
        let ticks: Vec<f64> = line.split_whitespace().map_while(|word| word.parse().ok()).take(8).collect();
        let [.., idle, iowait, _, _, _] = ticks[..] else { return None };
        let total: f64 = ticks.iter().sum();
        Some(Ticks { busy: (total - idle - iowait) / TICKS_PER_SECOND, total: total / TICKS_PER_SECOND })
    }

    /// The share of the machine that others took since `before`, given what the measured program used itself.
    pub(crate) fn taken_by_others(self, before: Ticks, own: f64) -> f64 {
        let total = self.total - before.total;
        if total > 0.0 { ((self.busy - before.busy - own) / total).clamp(0.0, 1.0) } else { 0.0 }
    }
}

/// Load averages over 1, 5 and 15 minutes, as the kernel writes them.
pub(crate) fn load_average() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split_whitespace().take(3).collect::<Vec<_>>().join(" ")
}

/// For the report.
pub(crate) fn describe() -> Json {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let kernel = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let pages = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or_default();
    Json::from([
        member("cpu", field(&cpuinfo, "model name").unwrap_or("unknown")),
        member("cores", cores()),
        member("flags", simd(&cpuinfo)),
        member("kernel", kernel.trim()),
        member("large_pages", pages.trim()),
    ])
}

pub(crate) fn cores() -> u32 {
    std::thread::available_parallelism().ok().and_then(|n| u32::try_from(n.get()).ok()).unwrap_or(1)
}

fn field<'a>(cpuinfo: &'a str, name: &str) -> Option<&'a str> {
    let values = cpuinfo.lines().filter_map(|line| line.split_once(':'));
    values.into_iter().find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim())
}

/// The instruction sets that decide these speeds.
fn simd(cpuinfo: &str) -> String {
    let deciding = |flag: &&str| flag.starts_with("avx") || matches!(*flag, "fma" | "f16c") || flag.starts_with("amx");
    field(cpuinfo, "flags").unwrap_or_default().split_whitespace().filter(deciding).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_others_took_is_what_is_left_of_busy_time() {
        let before = Ticks::from_stat("cpu  100 0 50 1000 20 0 5 0 0 0\ncpu0 1 2 3\n").unwrap();
        let after = Ticks::from_stat("cpu  500 0 150 1500 20 0 5 100 0 0\n").unwrap();
        // 11 s passed over all cores, 6 of them busy (1 stolen); the program itself used 3.8.
        assert!((after.taken_by_others(before, 3.8) - 0.2).abs() < 1e-9);
        assert_eq!(after.taken_by_others(before, 100.0), 0.0);
        assert_eq!(before.taken_by_others(before, 0.0), 0.0);
        for broken in ["", "cpu", "cpu  1 2 3", "intr 1"] {
            assert_eq!(Ticks::from_stat(broken), None, "{broken:?}");
        }
    }

    #[test]
    fn the_best_pass_is_the_ceiling() {
        assert_eq!(best_of("21.5\n30.2\n 29.0\n"), Some(30.2));
        assert_eq!(best_of(""), None);
        assert_eq!(best_of("30.2\nno memory\n"), None);
    }

    #[test]
    fn the_processor_is_described_by_what_decides_speed() {
        let cpuinfo = "processor\t: 0\nmodel name\t: A CPU\nflags\t\t: fpu avx2 fma sse2 avx512_vnni\n";
        assert_eq!(field(cpuinfo, "model name"), Some("A CPU"));
        assert_eq!(simd(cpuinfo), "avx2 fma avx512_vnni");
    }
}
