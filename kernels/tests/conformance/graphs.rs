//! Steps as graphs, and memory from one allocation: how often the host speaks to the device, and that results are those
//! of launches one by one.

use std::sync::Arc;

use phalanx_kernels::cuda::{Counts, Emulated, Fault, ScratchShape, arena_bytes, scratch_bytes};
use phalanx_kernels::{Backend, Cuda, Draw, Edit, KernelError, Precision, Sampled};

use crate::compare::same;
use crate::contract::chunks_of_any_size;
use crate::data::Random;
use crate::layer::{DIM, EXPERTS, HEADS, HIDDEN, Layers, Row, TOP_K, VOCAB};
use crate::{Make, PRECISIONS, make_cuda};

/// Memory of the small model, and of a few more buffers than it has.
const BYTES: u64 = 16 << 20;

fn device(fault: Option<Fault>) -> Emulated {
    Emulated { fault, ..Emulated::default() }
}

/// Backends whose memory is one allocation.
fn make_arena(precision: Precision, fault: Option<Fault>) -> Make<Cuda> {
    let make = move || {
        let mut cuda = Cuda::new(Arc::new(device(fault)), precision).unwrap();
        cuda.take_memory(BYTES).unwrap();
        cuda
    };
    let name = format!("cuda {precision:?}, emulated, in one allocation");
    Make { name, make: Box::new(make), ..make_cuda(device(fault), precision) }
}

fn row(sequence: u32, position: u32) -> Row {
    (sequence, position, (position * 37 + sequence * 11 + 5) % VOCAB as u32)
}

/// What a call adds to the counts.
fn counted(layers: &mut Layers<Cuda>, act: impl FnOnce(&mut Layers<Cuda>)) -> Counts {
    let before = layers.backend.counts();
    act(layers);
    let after = layers.backend.counts();
    Counts {
        uploads: after.uploads - before.uploads,
        downloads: after.downloads - before.downloads,
        submissions: after.submissions - before.submissions,
        graphs: after.graphs - before.graphs,
        nodes: after.nodes - before.nodes,
        instantiated: after.instantiated - before.instantiated,
        updated: after.updated - before.updated,
        evicted: after.evicted - before.evicted,
        // How it is found is not what it does.
        compared: 0,
    }
}

/// One row at a time, over the borders of a window and of a segment: inputs, rows to gather and draws go to the device, one
/// graph is launched, tokens and status come back.
#[test]
fn a_decode_step_is_one_graph() {
    for precision in PRECISIONS {
        let run = |fault| {
            let mut layers = Layers::new(&make_arena(precision, fault), 4);
            layers.backend.reserve(&scratch(4)).unwrap();
            let mut steps: Vec<(Vec<Sampled>, Counts)> = Vec::new();
            for position in 0..100 {
                let draw = Draw { temperature: 1.0, seed: 3, ..Draw::greedy(0, position + 1) };
                let mut drawn = Vec::new();
                let counts = counted(&mut layers, |layers| drawn = layers.draw(&[row(0, position)], &[draw]));
                steps.push((drawn, counts));
            }
            (steps, layers.backend.take_warning())
        };
        let ((graphs, none), (plain, why)) = (run(None), run(Some(Fault::NoGraphs)));
        assert!(none.is_none() && matches!(why, Some(KernelError::Device { what: "make a graph", .. })));
        assert!(graphs.iter().zip(&plain).all(|(one, other)| one.0 == other.0), "{precision:?}");
        assert!(plain.iter().all(|(_, counts)| counts.graphs == 0));
        // The first step makes room; then, in exact precision, the past comes to span two segments in both layers, and later
        // in the full one alone.
        for (position, (_, counts)) in graphs.iter().enumerate().filter(|(position, _)| ![0, 1].contains(position)) {
            let steady = Counts { uploads: 3, downloads: 2, submissions: 1, nodes: counts.nodes, ..Counts::default() };
            // Segments are another structure, launched one by one when first seen and made a graph when seen again.
            let expected = match (precision, position) {
                (Precision::Exact, 64 | 83) => steady,
                (_, 2) | (Precision::Exact, 65 | 84) => Counts { graphs: 1, instantiated: 1, ..steady },
                _ => Counts { graphs: 1, ..steady },
            };
            assert_eq!(*counts, expected, "{precision:?}, position {position}");
        }
    }
}

/// Steps of many sizes in any order give the bits that they give one by one.
#[test]
fn sizes_come_and_go() {
    for precision in PRECISIONS {
        let run = |fault| {
            let mut random = Random(91);
            let mut layers = Layers::new(&make_arena(precision, fault), 24);
            let mut positions = [0; 8];
            let steps: Vec<Vec<f32>> = (0..60)
                .map(|_| {
                    let rows = [1, 2, 3, 1, 2, 8, 20][random.below(7) as usize];
                    let rows: Vec<Row> = (0..rows)
                        .map(|i| {
                            let position = &mut positions[i % 8];
                            *position += 1;
                            row(i as u32 % 8, *position - 1)
                        })
                        .collect();
                    layers.step(&rows)
                })
                .collect();
            (steps, layers.backend.counts())
        };
        let ((graphs, counts), (plain, none)) = (run(None), run(Some(Fault::NoGraphs)));
        for (step, (graph, plain)) in graphs.iter().zip(&plain).enumerate() {
            same(&format!("{precision:?}, step {step}"), VOCAB, plain, graph).unwrap();
        }
        assert!(counts.graphs > 40 && counts.instantiated < 20, "{counts:?}");
        assert_eq!(none.graphs, 0);
    }
}

/// A graph that is kept never touches memory that was given back since it was made: its nodes are always the step's own. One
/// that stays as it was made does, and is seen.
#[test]
fn memory_given_back_is_not_touched_any_more() {
    let run = |fault| {
        let mut layers = Layers::new(&make_arena(Precision::Exact, fault), 1);
        let mut logits: Vec<f32> = (0..3).flat_map(|position| layers.step(&[row(0, position)])).collect();
        // What some of the buffers had becomes others' memory.
        layers.move_buffers();
        let b = &mut layers.backend;
        let mut others: Vec<_> = (0..200).map(|_| b.rows(1, 16)).collect();
        let content = |i: usize| vec![i as f32 + 0.5; 16];
        others.iter_mut().enumerate().for_each(|(i, other)| b.write(other, &content(i)));
        logits.extend((3..6).flat_map(|position| layers.step(&[row(0, position)])));
        let b = &mut layers.backend;
        let kept = others.iter().enumerate().all(|(i, other)| b.read(other) == content(i));
        (logits, kept, b.counts())
    };
    let (expected, kept, none) = run(Some(Fault::NoGraphs));
    assert!(kept && none.graphs == 0);
    let (logits, kept, counts) = run(None);
    assert!(kept && counts.graphs >= 4);
    same("after others took the memory", VOCAB, &expected, &logits).unwrap();
    // Graphs that are launched without their changes.
    let (logits, kept, counts) = run(Some(Fault::Stale));
    assert!(counts.graphs >= 4 && counts.updated > 0);
    assert!(!kept && logits != expected, "a graph that stays as it was is not seen");
}

/// The numeric contract holds where memory is one allocation, used again at once.
#[test]
fn in_one_allocation_rows_are_as_ever() {
    chunks_of_any_size(&make_arena(Precision::Fast, None));
}

fn scratch(rows: usize) -> ScratchShape {
    ScratchShape {
        rows,
        sequences: 8,
        positions: 8 * 16,
        pools: 2,
        projected: HIDDEN.max(HEADS * DIM),
        heads: HEADS,
        head_dim: DIM,
        experts: EXPERTS,
        top_k: TOP_K,
        slots: EXPERTS,
        ranks: 1,
        vocab: VOCAB,
        logits_rows: rows,
        sampled: rows,
        token_slots: 8,
        edits: 40,
        logprobs: 30,
    }
}

/// What the backend holds for itself stays within its bound, reserved or not; what was reserved does not grow.
#[test]
fn scratch_stays_within_its_bound() {
    const ROWS: usize = 40;
    for (precision, reserved) in PRECISIONS.into_iter().flat_map(|precision| [(precision, false), (precision, true)]) {
        let mut random = Random(92);
        let mut layers = Layers::new(&make_arena(precision, None), ROWS);
        let asked = layers.backend.allocated();
        let shape = scratch(ROWS);
        if reserved {
            layers.backend.reserve(&shape).unwrap();
        }
        let start = layers.backend.allocated();
        let mut most = start;
        for _ in 0..60 {
            let rows = 1 + random.below(ROWS as u32);
            // A run of one sequence, or rows of all.
            let (first, run) = (random.below(128 - rows), random.below(2) == 0);
            let rows: Vec<Row> =
                (0..rows).map(|i| if run { row(2, first + i) } else { row(i % 8, first + i / 8) }).collect();
            let draws: Vec<Draw> = (0..random.below(rows.len() as u32 + 1))
                .map(|i| Draw {
                    temperature: 0.5,
                    edits: (0..random.below(41)).map(|token| Edit { token, repetition: 1.5, add: 0.5 }).collect(),
                    allowed: (random.below(2) == 0).then(|| vec![u64::MAX; 2].into()),
                    logprobs: (random.below(2) == 0).then(|| random.below(31)),
                    ..Draw::greedy(i % 8, 1)
                })
                .collect();
            layers.draw(&rows, &draws);
            most = most.max(layers.backend.allocated());
        }
        let bound = scratch_bytes(&shape);
        assert!(most - asked <= bound, "{precision:?}: {} of {bound}", most - asked);
        // Neither is the bound far away: most of it is room for draws, and where halves meet on Hopper, which this is not.
        let own = bound - ((12 << 20) + 4096);
        assert!(!reserved || (most - asked) * 10 > own * 9, "{precision:?}: {} of {bound}", most - asked);
        let drawn = ROWS * (24 + 30 * 8) + (EXPERTS + 1) * 16 + 1024;
        assert!(!reserved || most - start <= drawn as u64, "{precision:?}: {} more", most - start);
    }
}

/// What is copied ahead of what is recorded never goes to memory that this still uses.
#[test]
fn room_made_within_a_step_is_written_behind_it() {
    let mut b = make_arena(Precision::Exact, None).backend();
    let (mut x, mut first, mut second) = (b.rows(3, 8), b.rows(3, 8), b.rows(3, 8));
    let values: Vec<f32> = (0..24).map(|i| i as f32).collect();
    b.write(&mut x, &values);
    // Recorded from here on: the room is set to zero, and gathers read their rows there.
    b.reserve(&scratch(100)).unwrap();
    b.gather(&x, &[2, 0], &mut first);
    b.gather(&x, &[1, 2], &mut second);
    assert_eq!(b.read(&first), [&values[16..], &values[..8]].concat());
    assert_eq!(b.read(&second), values[8..]);
    b.finish().unwrap();
}

/// What was taken is used up first; more is taken where the device has it, and else refused, saying what there is.
#[test]
fn one_allocation_comes_first() {
    let mut b = Cuda::new(Arc::new(Emulated { largest: Some(2000), ..device(None) }), Precision::Exact).unwrap();
    let bytes = arena_bytes(2 * 100 * 4 + 5 * 4, 3);
    b.take_memory(bytes).unwrap();
    assert!(matches!(b.take_memory(bytes), Err(KernelError::Device { what: "allocate", .. })));
    let (one, other, small) = (b.rows(1, 100), b.rows(100, 1), b.rows(1, 5));
    b.finish().unwrap();
    drop((one, small));
    let (_one, _small) = (b.rows(1, 100), b.rows(5, 1));
    b.finish().unwrap();
    drop(other);
    let _beyond = b.rows(1, 400);
    b.finish().unwrap();
    let _none = b.rows(HIDDEN, 100);
    let error = b.finish().unwrap_err().to_string();
    assert!(error.contains("38400 bytes: of 1792 planned, "), "{error}");
    let mut b = Cuda::new(Arc::new(Emulated { largest: Some(1000), ..device(None) }), Precision::Exact).unwrap();
    assert!(b.take_memory(1001).is_err() && b.take_memory(0).is_err() && b.take_memory(u64::MAX).is_err());
}
