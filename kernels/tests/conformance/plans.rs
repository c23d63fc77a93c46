//! A step that names what does not exist is an error at its end, never a panic; the next step is as ever.

use std::sync::Arc;

use phalanx_kernels::cuda::Emulated;
use phalanx_kernels::{
    Backend, Cuda, DenseUse, Draw, KernelError, KvLayer, KvShape, PoolShape, Precision, Stack, StepInputs, TokenSource,
};

use crate::data::{Random, Tensor, rope_table};
use crate::{Make, Tested};

const LAYER: KvLayer = KvLayer { pool: 0, layer: 0 };
const DRAW: Draw = Draw::greedy(0, 0);

/// What is named and how.
type Fault = (&'static str, fn(&mut StepInputs));

/// Two rows of one sequence at positions 30 and 31.
fn inputs() -> StepInputs {
    StepInputs {
        tokens: vec![TokenSource::Given(3), TokenSource::Sampled(1)],
        positions: vec![30, 31],
        sequences: vec![0, 0],
        tables: vec![vec![vec![2, 0]]],
    }
}

/// Embeds, stores and attends; four heads and one kv head of 8.
fn run<B: Tested>(b: &mut B, inputs: &StepInputs, window: Option<u32>) -> Result<(), KernelError> {
    let table = Random(71).tensor(10 * 48, 1.0);
    let embedding = b.embedding(48, table.embedding())?;
    let sinks = b.vector(Tensor::new(&[0.0; 4]).source())?;
    let mut kv = b.kv(&KvShape { pools: vec![PoolShape { layers: 1, blocks: 3 }], kv_heads: 1, head_dim: 8 });
    let (mut qkv, mut out) = (b.rows(2, 48), b.rows(2, 32));
    b.token_slots(2);
    b.begin(inputs, &rope_table(8));
    b.embed(&embedding, &mut qkv);
    b.rotate_and_store(&mut qkv, &mut kv, LAYER);
    b.attend(&qkv, &kv, LAYER, &sinks, window, &mut out);
    b.finish()
}

/// The reference trusts its plan.
pub(crate) fn trusts<B>(make: &Make<B>) -> bool {
    make.name.starts_with("reference")
}

pub(crate) fn what_does_not_exist_is_named<B: Tested>(make: &Make<B>) {
    if trusts(make) {
        return;
    }
    let faults: [Fault; 8] = [
        ("token 10", |i| i.tokens[0] = TokenSource::Given(10)),
        ("token slot 2", |i| i.tokens[1] = TokenSource::Sampled(2)),
        ("sequence 1", |i| i.sequences[1] = 1),
        ("stretch of a block table 2", |i| i.positions[1] = 32),
        ("stretch of a block table 268435455", |i| i.positions[0] = u32::MAX),
        ("KV block 3", |i| i.tables[0][0][1] = 3),
        ("KV block 4294967295", |i| i.tables[0][0][0] = u32::MAX),
        ("table of pool 0", |i| i.tables.clear()),
    ];
    let mut b = make.backend();
    for (what, fault) in faults {
        let mut inputs = inputs();
        fault(&mut inputs);
        let error = run(&mut b, &inputs, None).unwrap_err().to_string();
        assert!(error.starts_with(&format!("the step names {what}, ")), "{error}");
    }
    for fault in [|i: &mut StepInputs| i.positions.truncate(1), |i: &mut StepInputs| i.sequences.clear()] {
        let mut inputs = inputs();
        fault(&mut inputs);
        assert!(matches!(run(&mut b, &inputs, None), Err(KernelError::Size { .. })));
    }
    run(&mut b, &inputs(), None).unwrap();
}

/// Steps may be under way together; each fails for itself, whether it is the host that finds out or the device.
pub(crate) fn errors_are_those_of_their_step<B: Tested>(make: &Make<B>) {
    if trusts(make) {
        return;
    }
    let mut b = make.backend();
    let table = Random(71).tensor(10 * 48, 1.0);
    let embedding = b.embedding(48, table.embedding()).unwrap();
    let mut x = b.rows(2, 48);
    let mut logits = b.rows(1, 10);
    b.token_slots(2);
    let steps = [(3, 4), (3, 10), (3, 5), (11, 6), (3, 7)].map(|(given, sampled)| {
        b.set_token(1, sampled);
        let inputs = StepInputs { tokens: vec![TokenSource::Given(given), TokenSource::Sampled(1)], ..inputs() };
        b.begin(&inputs, &rope_table(8));
        b.embed(&embedding, &mut x);
        b.write(&mut logits, &[0., 0., 0., 0., 0., 0., 0., 0., 0., 1.]);
        b.sample(&logits, &[DRAW]);
        b.end()
    });
    let results = steps.map(|step| b.result(step).map(|sampled| sampled[0].token).map_err(|error| error.to_string()));
    for (result, expected) in results.iter().zip([None, Some("token 10"), None, Some("token 11"), None]) {
        match (result, expected) {
            (Ok(9), None) => {}
            (Err(error), Some(what)) => assert!(error.starts_with(&format!("the step names {what}, ")), "{error}"),
            other => panic!("{}: {other:?}", make.name),
        }
    }
    assert!(b.finish().is_ok());
}

pub(crate) fn what_no_row_sees_may_not_exist<B: Tested>(make: &Make<B>) {
    if trusts(make) {
        return;
    }
    let mut inputs = inputs();
    inputs.tables[0][0][0] = u32::MAX;
    run(&mut make.backend(), &inputs, Some(15)).unwrap();
}

pub(crate) fn shapes_that_do_not_fit_are_refused<B: Tested>(make: &Make<B>) {
    if trusts(make) {
        return;
    }
    let mut b = make.backend();
    let weight = Random(72).tensor(16 * 8, 1.0);
    let dense = b.dense(DenseUse::Projection, 8, &[Stack { weight: weight.source(), bias: None }]).unwrap();
    let norm = b.vector(Tensor::new(&[1.0; 8]).source()).unwrap();
    let (mut x, mut narrow, mut few, mut wide) = (b.rows(3, 8), b.rows(3, 6), b.rows(2, 16), b.rows(3, 16));
    let mut routes = b.routes(3, 17);
    let mut kv = b.kv(&KvShape { pools: vec![PoolShape { layers: 1, blocks: 3 }], kv_heads: 1, head_dim: 8 });
    b.token_slots(1);
    b.begin(&StepInputs::default(), &rope_table(8));
    b.write(&mut x, &[1.0; 24]);
    b.finish().unwrap();
    let mut refused = |act: &mut dyn FnMut(&mut B)| {
        act(&mut b);
        assert!(matches!(b.finish(), Err(KernelError::Size { .. } | KernelError::Plan { .. })));
        b.finish().unwrap();
    };
    refused(&mut |b| b.write(&mut narrow, &[1.0; 24]));
    refused(&mut |b| b.write(&mut narrow, &[1.0; 7]));
    refused(&mut |b| b.project(&x, &dense, &mut narrow));
    refused(&mut |b| b.project(&x, &dense, &mut few));
    refused(&mut |b| b.project_add(&x, &dense, &mut wide));
    refused(&mut |b| b.norm(&x, &norm, 1e-5, &mut narrow));
    refused(&mut |b| b.route(&x, &dense, &mut routes));
    refused(&mut |b| b.gather(&x, &[0, 3], &mut wide));
    refused(&mut |b| b.sample(&x, &[DRAW]));
    refused(&mut |b| b.sample(&x, &[DRAW, DRAW, Draw { slot: 1, ..DRAW }]));
    refused(&mut |b| b.set_token(1, 0));
    refused(&mut |b| b.copy_block(&mut kv, 1, 0, 0));
    refused(&mut |b| b.copy_block(&mut kv, 0, 0, 3));
}

/// A device without memory is an error at the step's end at the latest, and stays one: its results are worthless.
#[test]
fn a_device_without_memory_says_so() {
    let mut failed = 0;
    for largest in [1, 16, 100, 200, 300, 400, 500, 700, 1000, 4000, 100_000] {
        let device = Emulated { largest: Some(largest), ..Emulated::default() };
        let Ok(mut b) = Cuda::new(Arc::new(device), Precision::Fast) else { continue };
        let ended = run(&mut b, &inputs(), None);
        if let Err(error) = ended {
            assert!(matches!(error, KernelError::Device { what: "allocate", .. }), "{largest}: {error}");
            failed += 1;
        }
        let mut rows = b.rows(100, 100);
        b.write(&mut rows, &[1.0; 100 * 100]);
        assert!(b.read(&rows).len() == 100 * 100 || matches!(b.finish(), Err(KernelError::Device { .. })), "{largest}");
    }
    assert!(failed > 3, "{failed} sizes were too small");
}
