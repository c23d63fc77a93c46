//! What may be said on the command line.

use std::path::PathBuf;

use super::floor::Dense;

pub(crate) const USAGE: &str = "\
Usage: cargo xtask bench-peers [OPTIONS]

Compares Phalanx on CPUs with llama.cpp and ik_llama.cpp on the same random weights, in interleaved rounds. The first
run builds both peers from source, which takes about 20 minutes. Keep the machine quiet: a busy one shows in the report.

Options:
      --size SIZE    tiny, mid (20b widths, small vocabulary) or full20b [default: full20b]
      --layers N     layers instead of the size's own; time and memory grow with them [default: 4]
      --dense TYPE   of the dense weights of every engine: q8 or bf16 [default: q8]
      --threads N    of every engine [default: all cores]
      --rounds N     each runs every engine once, in rotated order [default: 7]
      --only LIST    of c1 to c8, separated by commas [default: all]
      --no-ik        leave ik_llama.cpp out
      --json FILE    write every round and the machine to FILE
      --dir DIR      keep environments and weights here [default: peers/ in cargo's target folder]
      --phalanx FILE measure this binary instead of building one

  c1, c2 MXFP4 kernels   c3 decode   c4 prefill   c5 decode with a core taken   c6 decode of 8 sequences
  c7 nothing loaded to first token   c8 divergence of the logits from exact ones
";

/// More rounds or layers than anyone waits for.
const ROUNDS_MAX: u32 = 1000;
const LAYERS_MAX: u32 = 128;
const THREADS_MAX: u32 = 1024;

/// A comparison, by the number of its target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Case {
    Kernels,
    Decode,
    Prefill,
    Busy,
    Batched,
    FirstToken,
    Logits,
}

#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Options {
    pub(crate) size: String,
    pub(crate) layers: u32,
    pub(crate) dense: Dense,
    /// `None`: all cores.
    pub(crate) threads: Option<u32>,
    pub(crate) rounds: u32,
    pub(crate) only: Vec<Case>,
    pub(crate) ik: bool,
    pub(crate) json: Option<PathBuf>,
    pub(crate) dir: Option<PathBuf>,
    pub(crate) phalanx: Option<PathBuf>,
    /// Environments made elsewhere. Not in the help: a second set is only of use to those who work on this task.
    pub(crate) env_llama: Option<PathBuf>,
    pub(crate) env_ik: Option<PathBuf>,
}

impl Options {
    /// `Err` says what was not understood.
    pub(crate) fn parse(words: &[&str]) -> Result<Options, String> {
        let mut options = Options {
            size: "full20b".into(),
            layers: 4,
            dense: Dense::Q8,
            threads: None,
            rounds: 7,
            only: Vec::new(),
            ik: true,
            json: None,
            dir: None,
            phalanx: None,
            env_llama: None,
            env_ik: None,
        };
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let (name, given) = word.split_once('=').map_or((*word, None), |(name, value)| (name, Some(value)));
            if name == "--no-ik" && given.is_none() {
                options.ik = false;
                continue;
            }
            let value = given.or_else(|| words.next().copied()).ok_or_else(|| format!("{name} needs a value"))?;
            match name {
                "--size" if ["tiny", "mid", "full20b"].contains(&value) => options.size = value.into(),
                "--size" => return Err(format!("--size is tiny, mid or full20b, not {value:?}")),
                "--layers" => options.layers = number(name, value, LAYERS_MAX)?,
                "--dense" if value == "q8" => options.dense = Dense::Q8,
                "--dense" if value == "bf16" => options.dense = Dense::Bf16,
                "--dense" => return Err(format!("--dense is q8 or bf16, not {value:?}")),
                "--threads" => options.threads = Some(number(name, value, THREADS_MAX)?),
                "--rounds" => options.rounds = number(name, value, ROUNDS_MAX)?,
                "--only" => options.only = value.split(',').map(case).collect::<Result<_, _>>()?,
                "--json" => options.json = Some(value.into()),
                "--dir" => options.dir = Some(value.into()),
                "--phalanx" => options.phalanx = Some(value.into()),
                "--env-llama" => options.env_llama = Some(value.into()),
                "--env-ik" => options.env_ik = Some(value.into()),
                _ => return Err(format!("not an option: {name}")),
            }
        }
        Ok(options)
    }

    pub(crate) fn wants(&self, case: Case) -> bool {
        self.only.is_empty() || self.only.contains(&case)
    }
}

fn number(name: &str, value: &str, most: u32) -> Result<u32, String> {
    let parsed = value.parse().ok().filter(|n| (1..=most).contains(n));
    parsed.ok_or_else(|| format!("{name} is a number from 1 to {most}, not {value:?}"))
}

fn case(word: &str) -> Result<Case, String> {
    Ok(match word {
        "c1" | "c2" => Case::Kernels,
        "c3" => Case::Decode,
        "c4" => Case::Prefill,
        "c5" => Case::Busy,
        "c6" => Case::Batched,
        "c7" => Case::FirstToken,
        "c8" => Case::Logits,
        _ => return Err(format!("--only takes c1 to c8 separated by commas, not {word:?}")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_read_in_either_spelling() {
        let words = ["--size", "mid", "--layers=2", "--dense", "bf16", "--only", "c3,c8", "--no-ik", "--rounds=9"];
        let options = Options::parse(&words).unwrap();
        assert_eq!((options.size.as_str(), options.layers, options.rounds), ("mid", 2, 9));
        assert_eq!((options.dense, options.ik), (Dense::Bf16, false));
        assert!(options.wants(Case::Decode) && options.wants(Case::Logits) && !options.wants(Case::Batched));
        assert!(Options::parse(&[]).unwrap().wants(Case::Batched), "everything unless told otherwise");
    }

    #[test]
    fn what_is_not_understood_is_named() {
        for (words, named) in [
            (vec!["--size", "huge"], "huge"),
            (vec!["--layers", "0"], "--layers"),
            (vec!["--layers", "two"], "two"),
            (vec!["--rounds", "1000000"], "1000"),
            (vec!["--only", "c3,c9"], "c9"),
            (vec!["--dense", "f16"], "f16"),
            (vec!["--threads"], "--threads needs a value"),
            (vec!["--no-ik=1"], "--no-ik"),
            (vec!["fast"], "fast"),
        ] {
            let error = Options::parse(&words).unwrap_err();
            assert!(error.contains(named), "{words:?}: {error}");
        }
    }
}
