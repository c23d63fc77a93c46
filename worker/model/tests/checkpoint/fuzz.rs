//! Random damage to the files of a checkpoint ends in an error or in a checkpoint, never otherwise.

use std::fs;
use std::path::Path;

use crate::common::{INDEX, SHARD_0, copy_of, fixture, split};
use phalanx_model::Checkpoint;
use phalanx_model::checkpoint::inspect::Inspection;
use phalanx_model::checkpoint::names;
use proptest::prelude::*;

#[derive(Clone, Debug)]
enum Damage {
    Flip { at: usize, with: u8 },
    Cut { at: usize },
    Repeat { at: usize, length: usize },
    Number { at: usize, value: u64 },
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = any::<prop::sample::Index>().prop_map(|index| index.index(1 << 14));
    prop_oneof![
        4 => (at.clone(), 1..=255_u8).prop_map(|(at, with)| Damage::Flip { at, with }),
        1 => at.clone().prop_map(|at| Damage::Cut { at }),
        1 => (at.clone(), 1..200_usize).prop_map(|(at, length)| Damage::Repeat { at, length }),
        2 => (at, any::<u64>()).prop_map(|(at, value)| Damage::Number { at, value }),
    ]
}

/// Damages the first `within` bytes of a file, counted cyclically.
fn apply(bytes: &mut Vec<u8>, within: usize, damage: &Damage) {
    let within = within.min(bytes.len());
    if within == 0 {
        return;
    }
    match *damage {
        Damage::Flip { at, with } => bytes[at % within] ^= with,
        Damage::Cut { at } => bytes.truncate(at % within),
        Damage::Repeat { at, length } => {
            let at = at % within;
            let piece = bytes[at..(at + length).min(bytes.len())].to_vec();
            bytes.splice(at..at, piece);
        }
        Damage::Number { at, value } => {
            // Replaces the next number in the text, if there is one.
            let Some(begin) = (at % within..within).find(|&i| bytes[i].is_ascii_digit()) else { return };
            let end = (begin..within).find(|&i| !bytes[i].is_ascii_digit()).unwrap_or(within);
            bytes.splice(begin..end, value.to_string().into_bytes());
        }
    }
}

/// Reads all that an opened checkpoint offers.
fn survives(dir: &Path) {
    let opened = Checkpoint::open(dir);
    let (inspection, _) = Inspection::of_directory(dir);
    match opened {
        Ok(checkpoint) => {
            assert!(inspection.defects.is_empty(), "{:?}", inspection.defects);
            for expected in names::expected(checkpoint.config()) {
                let tensor = checkpoint.view(&expected.name).unwrap();
                assert_eq!(tensor.source.bytes().len() as u64, expected.bytes());
            }
        }
        Err(error) => assert_eq!(Some(&error.to_string()), inspection.defects.first()),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_damage_to_a_file_causes_a_panic(
        file in prop::sample::select(vec![SHARD_0, INDEX, "config.json", "generation_config.json"]),
        damages in prop::collection::vec(damage(), 1..4),
    ) {
        let copy = copy_of("tiny-a");
        let path = copy.path().join(file);
        let mut bytes = fs::read(&path).unwrap();
        let within = if file == SHARD_0 { 8 + split(&path).0.len() } else { bytes.len() };
        for damage in &damages {
            apply(&mut bytes, within, damage);
        }
        fs::write(&path, bytes).unwrap();
        survives(copy.path());
    }

    #[test]
    fn the_safetensors_library_accepts_what_is_accepted_here(damages in prop::collection::vec(damage(), 1..3)) {
        let copy = copy_of("tiny-a");
        let path = copy.path().join(SHARD_0);
        let mut bytes = fs::read(fixture("tiny-a").join(SHARD_0)).unwrap();
        let within = 8 + split(&path).0.len();
        for damage in &damages {
            apply(&mut bytes, within, damage);
        }
        fs::write(&path, &bytes).unwrap();
        let header_is_wrong = |error: &String| error.starts_with(path.to_str().unwrap()) && error.contains("header");
        if safetensors::SafeTensors::deserialize(&bytes).is_err() {
            prop_assert!(Checkpoint::open(copy.path()).is_err());
        } else {
            let (inspection, _) = Inspection::of_directory(copy.path());
            let twice = |error: &String| error.contains("twice") || error.contains("dimensions");
            prop_assert!(!inspection.defects.iter().any(|e| header_is_wrong(e) && !twice(e)), "{:?}", inspection.defects);
        }
    }
}
