//! Drawing tokens.

use std::sync::Arc;

use phalanx_kernels::random::uniform;
use phalanx_kernels::reference::sample::{log_softmax, probabilities};
use phalanx_kernels::{Draw, Edit, Sampled};

use crate::data::{Random, rope_table};
use crate::experts::step;
use crate::{Make, Tested, tolerances};

const DRAW: Draw = {
    let mut draw = Draw::greedy(0, 0);
    (draw.temperature, draw.seed) = (1.0, 1);
    draw
};

/// A token from each row.
fn draw<B: Tested>(make: &Make<B>, logits: &[f32], draws: &[Draw]) -> Vec<u32> {
    sampled(make, logits, draws).into_iter().map(|sampled| sampled.token).collect()
}

/// What each row gives.
pub(crate) fn sampled<B: Tested>(make: &Make<B>, logits: &[f32], draws: &[Draw]) -> Vec<Sampled> {
    let vocab = logits.len() / draws.len();
    let mut b = make.backend();
    b.token_slots(1);
    let mut rows = b.rows(draws.len(), vocab);
    b.begin(&step(0), &rope_table(8));
    b.write(&mut rows, logits);
    b.sample(&rows, draws);
    let ended = b.end();
    b.result(ended).unwrap()
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
        assert_eq!(draw(make, &logits, std::slice::from_ref(&greedy)), [expected], "{} {logits:?}", make.name);
    }
    if make.name.starts_with("reference") {
        return;
    }
    for (logits, expected) in [([nan, 1.0, nan, 2.0], 3), ([nan; 4], 0), ([-inf; 4], 0), ([nan, -inf, 5.0, nan], 2)] {
        assert_eq!(draw(make, &logits, std::slice::from_ref(&greedy)), [expected], "{} {logits:?}", make.name);
        let token = draw(make, &logits, &[DRAW])[0] as usize;
        assert!(!logits[token].is_nan() || expected == 0, "{} {logits:?} drew {token}", make.name);
    }
}

/// Whether `token` is where the running probability passes the draw's random number.
pub(crate) fn check(name: &str, logits: &[f32], draw: &Draw, token: u32) {
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

/// Bits of the tokens that `keep` keeps, of `vocab`.
fn mask(vocab: u32, keep: impl Fn(u32) -> bool) -> Arc<[u64]> {
    let word = |first: u32| (first..(first + 64).min(vocab)).filter(|&t| keep(t)).fold(0, |w, t| w | 1 << (t % 64));
    (0..vocab).step_by(64).map(word).collect()
}

pub(crate) fn keeps_what_is_asked_for<B: Tested>(make: &Make<B>) {
    let vocab = 333;
    let mut random = Random(23);
    let edit = |i: usize| {
        let tokens = (0..4).map(|n| (i * 31 + n * 77) as u32 % 333);
        let mut edits: Vec<Edit> = tokens
            .zip([0.7, 1.0, 1.4, 2.0])
            .map(|(token, r)| Edit { token, repetition: r, add: 3.0 - r * 2.0 })
            .collect();
        edits.dedup_by_key(|edit| edit.token);
        edits
    };
    let draws: Vec<Draw> = (0..180)
        .map(|i| Draw {
            temperature: [1.0, 0.5, 1.7][i % 3],
            top_k: [0, 1, 7, 50, 332, 333, 1000][i % 7],
            top_p: [1.0, 0.9, 0.3][i % 3],
            min_p: [0.0, 0.05, 0.5, 1.0][i % 4],
            edits: if i % 2 == 0 { edit(i) } else { Vec::new() },
            allowed: (i % 5 == 0).then(|| mask(vocab, |token| token % 3 == i as u32 % 3)),
            position: i as u32,
            ..DRAW
        })
        .collect();
    let logits: Vec<f32> = random.numbers(draws.len() * vocab as usize).iter().map(|x| x * 4.0).collect();
    let tokens = draw(make, &logits, &draws);
    for ((logits, one), token) in logits.chunks(vocab as usize).zip(&draws).zip(&tokens) {
        check(&make.name, logits, one, *token);
        assert!(one.allows(*token as usize), "{} {one:?} drew {token}", make.name);
    }
    // One most likely token is the greedy choice.
    let ones: Vec<Draw> = draws.iter().map(|draw| Draw { top_k: 1, ..draw.clone() }).collect();
    let greedy: Vec<Draw> = draws.iter().map(|draw| Draw { temperature: 0.0, ..draw.clone() }).collect();
    assert_eq!(draw(make, &logits, &ones), draw(make, &logits, &greedy), "{}", make.name);
    // Among equals the lowest ids are kept.
    let equals: Vec<Draw> = (0..60).map(|position| Draw { top_k: 3, position, ..DRAW }).collect();
    let drawn = draw(make, &[1.0; 60 * 40], &equals);
    assert_eq!(drawn.iter().max(), Some(&2), "{} {drawn:?}", make.name);
}

/// Rows of any length, of which a part, all or nothing is alike.
pub(crate) fn draws_from_long_rows<B: Tested>(make: &Make<B>) {
    let mut random = Random(26);
    // One backend, whose rows and vocabulary change.
    let mut b = make.backend();
    b.token_slots(1);
    let mut sampled = |logits: &[f32], draws: &[Draw]| {
        let mut rows = b.rows(draws.len(), logits.len() / draws.len());
        b.begin(&step(0), &rope_table(8));
        b.write(&mut rows, logits);
        b.sample(&rows, draws);
        let ended = b.end();
        b.result(ended).unwrap()
    };
    for vocab in [4096, 13_001, 4100] {
        let draws: Vec<Draw> = (0..24)
            .map(|i| Draw {
                temperature: [0.0, 0.4, 1.0, 1.5][i % 4],
                top_k: [0, 3, 0, 5000, 0, 40][i % 6],
                top_p: [1.0, 0.9, 0.999][i / 6 % 3],
                min_p: [0.0, 0.0, 0.01][i % 3],
                edits: if i % 5 == 0 { vec![Edit { token: 4095, repetition: 1.0, add: 9.0 }] } else { Vec::new() },
                allowed: (i % 7 == 6).then(|| mask(vocab, |token| token % 3 == 0)),
                position: i as u32,
                logprobs: (i % 8 == 3).then_some(7),
                ..DRAW
            })
            .collect();
        let mut logits: Vec<f32> = random.numbers(draws.len() * vocab as usize).iter().map(|x| x * 6.0).collect();
        for (i, logits) in logits.chunks_mut(vocab as usize).enumerate() {
            match i % 3 {
                0 => logits.iter_mut().for_each(|logit| *logit = logit.round()),
                1 => logits.fill(0.25),
                _ => {}
            }
        }
        let given = sampled(&logits, &draws);
        for ((logits, one), given) in logits.chunks(vocab as usize).zip(&draws).zip(&given) {
            check(&make.name, logits, one, given.token);
            if let Some(count) = one.logprobs {
                let mut order: Vec<usize> = (0..logits.len()).collect();
                order.sort_by(|&a, &b| logits[b].total_cmp(&logits[a]));
                let top: Vec<usize> = given.top.iter().map(|&(token, _)| token as usize).collect();
                assert_eq!(top, order[..count as usize], "{}", make.name);
            }
        }
        // A row gives the same alone.
        for (i, one) in draws.iter().enumerate().step_by(5) {
            let row = &logits[i * vocab as usize..][..vocab as usize];
            assert_eq!(sampled(row, std::slice::from_ref(one)), [given[i].clone()], "{}", make.name);
        }
    }
}

pub(crate) fn reports_logprobs_of_the_row_as_it_was<B: Tested>(make: &Make<B>) {
    let vocab = 200;
    let logits: Vec<f32> = Random(24).numbers(vocab).iter().map(|x| (x * 5.0 * 8.0).round() / 8.0).collect();
    let expected = log_softmax(&logits);
    let edits = vec![Edit { token: 9, repetition: 1.0, add: 100.0 }];
    let all = Draw { temperature: 0.7, edits, logprobs: Some(200), ..DRAW };
    for count in [0, 1, 5, 20, 200, 1000] {
        let [given] = sampled(make, &logits, &[Draw { logprobs: Some(count), ..all.clone() }]).try_into().unwrap();
        assert_eq!(given.token, 9, "{}", make.name);
        assert!((f64::from(given.logprob) - expected[9]).abs() < 1e-4, "{} {}", make.name, given.logprob);
        assert_eq!(given.top.len(), vocab.min(count as usize));
        for pair in given.top.windows(2) {
            let ((a, before), (b, after)) = (pair[0], pair[1]);
            assert!(before > after || (before == after && a < b), "{} {pair:?}", make.name);
        }
        for &(token, logprob) in &given.top {
            assert!((f64::from(logprob) - expected[token as usize]).abs() < 1e-4, "{} {token}", make.name);
        }
    }
    let [whole] = sampled(make, &logits, &[all]).try_into().unwrap();
    let sum: f64 = whole.top.iter().map(|(_, logprob)| f64::from(*logprob).exp()).sum();
    assert!((sum - 1.0).abs() < 1e-5, "{} {sum}", make.name);
    let nothing = sampled(make, &logits, &[DRAW]);
    assert!(nothing[0].top.is_empty() && nothing[0].logprob == 0.0);
}

pub(crate) fn survives_what_nobody_should_ask<B: Tested>(make: &Make<B>) {
    if make.name.starts_with("reference") {
        return;
    }
    let logits: Vec<f32> = Random(25).numbers(100).iter().map(|x| x * 3.0).collect();
    let numbers = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, -1.0, 0.0, 1e30, f32::MIN_POSITIVE];
    for a in numbers {
        for b in numbers {
            let edits = vec![Edit { token: 3, repetition: a, add: b }, Edit { token: 5000, repetition: 1.0, add: b }];
            let draws = [
                Draw { temperature: a, top_p: b, logprobs: Some(3), ..DRAW },
                Draw { min_p: a, top_p: b, top_k: 2, ..DRAW },
                Draw { temperature: b, edits, logprobs: Some(u32::MAX), ..DRAW },
            ];
            for one in draws {
                assert!(draw(make, &logits, &[one])[0] < 100);
            }
        }
    }
    // Nothing is allowed, or only what lies beyond the words given.
    for allowed in [Arc::from([]), Arc::from([0u64, 0])] {
        assert_eq!(draw(make, &logits, &[Draw { allowed: Some(allowed), ..DRAW }]), [0], "{}", make.name);
    }
    let last = Draw { allowed: Some(mask(100, |token| token == 99)), ..DRAW };
    assert_eq!(draw(make, &logits, &[last]), [99], "{}", make.name);
}
