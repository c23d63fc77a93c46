//! Drawing tokens.

use phalanx_kernels::Draw;
use phalanx_kernels::random::uniform;
use phalanx_kernels::reference::sample::probabilities;

use crate::data::{Random, rope_table};
use crate::experts::step;
use crate::{Make, Tested, tolerances};

const DRAW: Draw = Draw { slot: 0, temperature: 1.0, top_p: 1.0, seed: 1, choice: 0, position: 0 };

/// A token from each row.
fn draw<B: Tested>(make: &Make<B>, logits: &[f32], draws: &[Draw]) -> Vec<u32> {
    let vocab = logits.len() / draws.len();
    let mut b = make.backend();
    b.token_slots(1);
    let mut rows = b.rows(draws.len(), vocab);
    b.begin(&step(0), &rope_table(8));
    b.write(&mut rows, logits);
    b.sample(&rows, draws);
    let tokens = b.sampled();
    b.finish().unwrap();
    tokens
}

pub(crate) fn takes_the_largest<B: Tested>(make: &Make<B>) {
    let greedy = Draw { temperature: 0.0, ..DRAW };
    let (nan, inf) = (f32::NAN, f32::INFINITY);
    for (logits, expected) in [
        ([1.0, 3.0, 2.0, 3.0], 1),
        ([-5.0, -2.0, -2.0, -9.0], 1),
        ([-inf, -inf, -1.0, -inf], 2),
        ([0.0, 1.0, inf, inf], 2),
        ([-0.0, 0.0, 0.0, -1.0], 0),
    ] {
        assert_eq!(draw(make, &logits, &[greedy]), [expected], "{} {logits:?}", make.name);
    }
    if make.name.starts_with("reference") {
        return;
    }
    for (logits, expected) in [([nan, 1.0, nan, 2.0], 3), ([nan; 4], 0), ([-inf; 4], 0), ([nan, -inf, 5.0, nan], 2)] {
        assert_eq!(draw(make, &logits, &[greedy]), [expected], "{} {logits:?}", make.name);
        let token = draw(make, &logits, &[DRAW])[0] as usize;
        assert!(!logits[token].is_nan() || expected == 0, "{} {logits:?} drew {token}", make.name);
    }
}

/// Whether `token` is where the running probability passes the draw's random number.
fn check(name: &str, logits: &[f32], draw: &Draw, token: u32) {
    let probabilities = probabilities(logits, draw);
    let below: f64 = probabilities[..token as usize].iter().sum();
    let above = below + probabilities[token as usize];
    let target = uniform(draw.seed, draw.choice, draw.position);
    assert!(probabilities[token as usize] > 0.0, "{name} {draw:?} drew {token}, which is not kept");
    let room = tolerances::PROBABILITY;
    assert!(
        below - room <= target && target <= above + room,
        "{name} {draw:?} drew {token} in {below}..{above} for {target}"
    );
}

pub(crate) fn draws_by_the_inverse_distribution<B: Tested>(make: &Make<B>) {
    let vocab = 1000;
    let mut random = Random(21);
    let draws: Vec<Draw> = (0..60)
        .map(|i| Draw {
            temperature: [0.3, 1.0, 2.0][i % 3],
            seed: i as u64 / 7,
            choice: i as u32 % 2,
            position: i as u32,
            ..DRAW
        })
        .collect();
    let logits: Vec<f32> = random.numbers(draws.len() * vocab).iter().map(|x| x * 5.0).collect();
    let tokens = draw(make, &logits, &draws);
    for ((logits, draw), token) in logits.chunks(vocab).zip(&draws).zip(&tokens) {
        check(&make.name, logits, draw, *token);
    }
    assert!(tokens.windows(2).any(|pair| pair[0] != pair[1]), "tokens differ");
}

pub(crate) fn keeps_the_nucleus<B: Tested>(make: &Make<B>) {
    let vocab = 300;
    let mut random = Random(22);
    let draws: Vec<Draw> =
        (0..60).map(|i| Draw { top_p: [0.001, 0.1, 0.5, 0.9, 0.999][i % 5], position: i as u32, ..DRAW }).collect();
    let logits: Vec<f32> = random.numbers(draws.len() * vocab).iter().map(|x| x * 4.0).collect();
    for ((logits, one), token) in logits.chunks(vocab).zip(&draws).zip(draw(make, &logits, &draws)) {
        check(&make.name, logits, one, token);
    }
    // Four equals and a nucleus of half: the lowest two ids.
    let equals: Vec<Draw> = (0..40).map(|position| Draw { top_p: 0.5, position, ..DRAW }).collect();
    let tokens = draw(make, &[1.0; 160], &equals);
    assert!(tokens.contains(&0) && tokens.contains(&1) && tokens.iter().all(|&t| t < 2), "{} {tokens:?}", make.name);
    // Nothing asked for still keeps the likeliest.
    assert_eq!(draw(make, &[0.0, 1.0, 0.5], &[Draw { top_p: 0.0, ..DRAW }]), [1], "{}", make.name);
}
