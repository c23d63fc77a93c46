//! How far each engine's logits are from exact ones: the same tokens, every position, over the whole vocabulary.

use std::path::Path;

use super::engine::{Engine, Setup};
use super::json::{Json, member};
use super::stats::{Summary, divergence};

/// Positions compared.
const POSITIONS: u32 = 256;

/// Divergence of one engine.
#[derive(Clone, Debug)]
pub(crate) struct Distance {
    pub(crate) engine: Engine,
    /// Of each position, in nats.
    pub(crate) kl: Vec<f64>,
    /// Positions at which the likeliest token is the reference's.
    pub(crate) same_token: usize,
}

impl Distance {
    pub(crate) fn mean(&self) -> f64 {
        self.kl.iter().sum::<f64>() / self.kl.len().max(1) as f64
    }

    pub(crate) fn json(&self) -> Json {
        Json::from([
            member("engine", self.engine.name()),
            member("mean_kl", self.mean()),
            member("median_kl", Summary::of(&self.kl).map(|summary| summary.median)),
            member("same_token", self.same_token as f64),
            member("kl", self.kl.iter().map(|kl| Json::from(*kl)).collect::<Vec<_>>()),
        ])
    }
}

/// The reference is Phalanx with `--precision exact` on the checkpoint as it is: f32 activations, nothing quantised
/// beyond what the checkpoint holds.
pub(crate) fn distances(setup: &Setup, engines: &[Engine], vocab: u32, folder: &Path) -> Result<Vec<Distance>, String> {
    let ids = tokens(vocab);
    let file = |name: &str| folder.join(format!("{name}.f32"));
    let reference = file("exact");
    phalanx(setup, &ids, "exact", &reference)?;
    let reference = read(&reference, vocab)?;
    let mut distances = Vec::new();
    for engine in engines {
        println!("logits of {}", engine.name());
        let path = file(engine.name());
        if *engine == Engine::Phalanx {
            phalanx(setup, &ids, "fast", &path)?;
        } else {
            let (mut program, _) = setup.peer(*engine)?;
            program.ask(&format!("logits {} {ids}", path.display()))?;
            program.finish()?;
        }
        distances.push(compare(*engine, &reference, &read(&path, vocab)?, vocab as usize)?);
    }
    for name in engines.iter().map(|engine| engine.name()).chain(["exact"]) {
        // They are large and made anew each time: what cannot be removed is only in the way.
        let _ = std::fs::remove_file(file(name));
    }
    Ok(distances)
}

/// A fixed sequence of ids, any of the vocabulary, separated by commas.
fn tokens(vocab: u32) -> String {
    let id = |i: u32| u64::from(i).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 33;
    let ids: Vec<String> = (1..=POSITIONS).map(|i| (id(i) % u64::from(vocab)).to_string()).collect();
    ids.join(",")
}

fn phalanx(setup: &Setup, ids: &str, precision: &str, path: &Path) -> Result<(), String> {
    let path = path.to_string_lossy();
    let arguments = ["model", "logits", "--json", "--prompt-ids", ids, "--precision", precision, "--save", &path];
    setup.phalanx_json(&arguments, precision != "exact").map(drop)
}

fn read(path: &Path, vocab: u32) -> Result<Vec<f32>, String> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let wanted = POSITIONS as usize * vocab as usize * 4;
    if bytes.len() != wanted {
        return Err(format!("{}: {} bytes instead of {wanted}: is the disk full?", path.display(), bytes.len()));
    }
    Ok(bytes.chunks_exact(4).map(|four| f32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect())
}

fn compare(engine: Engine, reference: &[f32], logits: &[f32], vocab: usize) -> Result<Distance, String> {
    let mut distance = Distance { engine, kl: Vec::new(), same_token: 0 };
    for (reference, logits) in reference.chunks(vocab).zip(logits.chunks(vocab)) {
        let (kl, same) = divergence(reference, logits);
        if !kl.is_finite() {
            return Err(format!("{}: the logits of position {} are not numbers", engine.name(), distance.kl.len()));
        }
        distance.kl.push(kl);
        distance.same_token += usize::from(same);
    }
    Ok(distance)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_position_is_compared_with_its_own() {
        let reference = [0.0, 1.0, 2.0, 0.0, 5.0, 5.5];
        let same = compare(Engine::Llama, &reference, &reference, 2).unwrap();
        assert_eq!((same.kl.len(), same.same_token, same.mean()), (3, 3, 0.0));
        let moved = compare(Engine::Llama, &reference, &[0.0, 1.0, 0.0, 2.0, 5.0, 5.5], 2).unwrap();
        assert_eq!(moved.same_token, 2);
        assert!(moved.kl[1] > 1.0 && moved.kl[0] == 0.0 && moved.kl[2] == 0.0, "{:?}", moved.kl);
        let broken = compare(Engine::Llama, &reference, &[0.0, 1.0, f32::NAN, 2.0, 5.0, 5.5], 2).unwrap_err();
        assert!(broken.contains("position 1"), "{broken}");
    }

    #[test]
    fn tokens_are_of_the_vocabulary_and_differ() {
        let ids = tokens(1024);
        let ids: Vec<u32> = ids.split(',').map(|id| id.parse().unwrap()).collect();
        assert_eq!(ids.len(), POSITIONS as usize);
        assert!(ids.iter().all(|id| *id < 1024));
        let distinct: std::collections::BTreeSet<u32> = ids.iter().copied().collect();
        assert!(distinct.len() > 50, "{}", distinct.len());
    }
}
