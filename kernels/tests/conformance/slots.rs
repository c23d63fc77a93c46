//! Parts that travel in slots, and gathered records, against parts that travel as they are.

#![allow(unsafe_code, reason = "one device's memory is copied to another's")]

use std::sync::Arc;

use phalanx_kernels::cuda::{Emulated, Parts, Port, SLOT_HEADER, Slot};
use phalanx_kernels::{Backend, Cuda, DenseUse, ExpertShape, HostParts, KernelError, Precision, Stack};

use crate::data::{Expert, Random, Tensor, rope_table};
use crate::experts::step;
use crate::{HOPPER, PRECISIONS, Tested};

const HIDDEN: usize = 32;
const EXPERTS: usize = 8;
const TOP_K: usize = 3;
const ROWS_MAX: usize = 40;
const SHAPE: ExpertShape = ExpertShape { hidden: HIDDEN, intermediate: 32, limit: 7.0 };
const MOMENT: [u64; 3] = [3, 1 << 40, 77];

/// How rows travel.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Exact,
    /// Slots with room for so many rows.
    Slots(usize),
    /// Every row to every rank, in slots with room for so many; results in slots.
    Gather(usize),
}

/// Experts of each row of each rank, in the order of the choices.
type Routing = Vec<Vec<[usize; TOP_K]>>;

/// One rank of a cell on an emulated device.
struct Rank {
    me: u32,
    backend: Cuda,
    port: Port,
    outgoing: Parts,
    incoming: Parts,
}

impl Rank {
    fn slot(&self, rows: usize, dispatch: bool) -> Slot {
        let (record, result) = (self.backend.dispatch_record(TOP_K, HIDDEN), self.backend.combine_record(HIDDEN));
        let (row_bytes, rows) = if dispatch { (record, rows) } else { (result, rows * TOP_K) };
        Slot { bytes: (rows * row_bytes).next_multiple_of(16), row_bytes, exchange: u32::from(dispatch) }
    }
}

/// What came out of a layer: residuals of each rank, and what each received in dispatch.
#[derive(Debug, PartialEq)]
struct Outcome {
    residuals: Vec<Vec<u32>>,
    received: Vec<HostParts>,
}

/// Moves everyone's outgoing parts to where they belong.
fn exchange(cell: &mut [Rank], way: Way, dispatch: bool) -> Result<(), KernelError> {
    let n = cell.len();
    let (rows, gathered) = match way {
        Way::Exact => {
            let sent: Vec<HostParts> = cell.iter().map(|rank| rank.outgoing.download().unwrap()).collect();
            for (to, rank) in cell.iter_mut().enumerate() {
                let sizes: Vec<usize> = sent.iter().map(|parts| parts.by_rank[to].len()).collect();
                let own = rank.port.sizes(&rank.outgoing)?;
                assert_eq!(own, sent[to].by_rank.iter().map(Vec::len).collect::<Vec<_>>());
                rank.port.room(&mut rank.incoming, &sizes)?;
                let by_rank = sent.iter().map(|parts| parts.by_rank[to].clone()).collect();
                rank.incoming.upload(&HostParts { by_rank })?;
            }
            return Ok(());
        }
        Way::Slots(rows) => (rows, false),
        Way::Gather(rows) => (rows, dispatch),
    };
    let slot = cell[0].slot(rows, dispatch);
    let slots: Vec<u64> =
        cell.iter_mut().map(|rank| rank.port.pack(&rank.outgoing, slot, rank.me)).collect::<Result<_, _>>()?;
    // Each rank enqueues for itself: what others are to read must be on its way.
    for rank in cell.iter() {
        rank.port.stream()?;
    }
    for (to, rank) in cell.iter_mut().enumerate() {
        let landing = rank.port.landing(&mut rank.incoming, slot)?;
        for (from, slots) in slots.iter().enumerate() {
            let at = if gathered { 0 } else { to * slot.stride() };
            // SAFETY: both lie within slots and room of `n` times the stride, which `pack` and `landing` have checked.
            unsafe { rank.port.copy(slots + at as u64, landing + (from * slot.stride()) as u64, slot.stride())? };
        }
        let me = gathered.then_some(rank.me);
        rank.port.unpack(&mut rank.incoming, slot, me)?;
    }
    assert_eq!(slots.len(), n);
    cell.iter_mut().try_for_each(|rank| {
        let look = rank.port.end()?;
        assert!(look.is_done()?);
        rank.port.seen(look)
    })
}

/// The records of this rank in what was received, as an exact dispatch would have brought them.
fn own_records(parts: HostParts, record: usize, gathered: Option<u32>) -> HostParts {
    let Some(me) = gathered else { return parts };
    let pick = |record: &[u8]| {
        let (entries, row) = record.split_at(4 * TOP_K);
        let entry = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().unwrap());
        let own = |entry: u32| if entry >> 16 == me { entry & 0xffff } else { u32::MAX };
        let slots: Vec<u32> = entries.chunks(4).map(|bytes| own(entry(bytes))).collect();
        let kept: Vec<u8> = slots.iter().flat_map(|slot| slot.to_le_bytes()).chain(row.iter().copied()).collect();
        slots.iter().any(|&slot| slot != u32::MAX).then_some(kept)
    };
    HostParts {
        by_rank: parts.by_rank.iter().map(|part| part.chunks(record).filter_map(pick).flatten().collect()).collect(),
    }
}

/// A MoE layer on `routing.len()` ranks.
fn layer(precision: Precision, routing: &Routing, way: Way) -> Result<Outcome, KernelError> {
    layer_on(Emulated::default(), precision, routing, way)
}

/// The same on these devices.
fn layer_on(device: Emulated, precision: Precision, routing: &Routing, way: Way) -> Result<Outcome, KernelError> {
    let n = routing.len();
    let per_rank = EXPERTS.div_ceil(n);
    let places: Vec<(u32, u32)> = (0..EXPERTS).map(|e| ((e / per_rank) as u32, (e % per_rank) as u32)).collect();
    let mut random = Random(77);
    let experts: Vec<Expert> = (0..EXPERTS).map(|_| Expert::random(&mut random, HIDDEN, 32)).collect();
    let unit: Vec<f32> = (0..EXPERTS * HIDDEN).map(|i| f32::from(u8::from(i / HIDDEN == i % HIDDEN))).collect();
    let unit = Tensor::new(&unit);

    let mut cell: Vec<Rank> = (0..n as u32)
        .map(|me| {
            let mut backend = Cuda::new(Arc::new(device), precision).unwrap();
            backend.routes(0, TOP_K);
            let result = backend.combine_record(HIDDEN);
            let bytes = n * ROWS_MAX * backend.dispatch_record(TOP_K, HIDDEN).max(TOP_K * result);
            let mut port = Port::new(&backend, bytes + n * SLOT_HEADER).unwrap();
            port.begin(MOMENT).unwrap();
            let (outgoing, incoming) = (backend.parts(n, bytes), backend.parts(n, bytes));
            Rank { me, backend, port, outgoing, incoming }
        })
        .collect();
    // Rows whose largest numbers are those of the experts to choose.
    let mut state: Vec<_> = cell
        .iter_mut()
        .zip(routing)
        .map(|(rank, rows)| {
            let b = &mut rank.backend;
            let mut held = b.experts(per_rank, SHAPE);
            for (expert, &(home, slot)) in experts.iter().zip(&places).filter(|(_, place)| place.0 == rank.me) {
                b.load_expert(&mut held, slot as usize, &expert.source()).unwrap();
                assert_eq!(home, rank.me);
            }
            let router = b.dense(DenseUse::Router, HIDDEN, &[Stack { weight: unit.source(), bias: None }]).unwrap();
            let mut numbers: Vec<f32> = random.numbers(rows.len() * HIDDEN);
            for (row, chosen) in numbers.chunks_mut(HIDDEN).zip(rows) {
                (0..TOP_K).for_each(|k| row[chosen[k]] = 4.0 - k as f32);
            }
            b.begin(&step(rows.len()), &rope_table(8));
            let mut x = b.rows(ROWS_MAX, HIDDEN);
            b.write(&mut x, &numbers);
            let mut routes = b.routes(ROWS_MAX, TOP_K);
            b.route(&x, &router, &mut routes);
            let places = b.places(&places);
            let gathered = matches!(way, Way::Gather(_)).then_some(rank.me);
            rank.port.gather(&mut rank.outgoing, gathered);
            b.dispatch(&x, &routes, &places, &mut rank.outgoing);
            (held, x, routes, places)
        })
        .collect();

    exchange(&mut cell, way, true)?;
    let mut received = Vec::new();
    for (rank, (held, ..)) in cell.iter_mut().zip(&state) {
        let b = &mut rank.backend;
        let gathered = matches!(way, Way::Gather(_)).then_some(rank.me);
        received.push(own_records(b.download(&rank.incoming), b.dispatch_record(TOP_K, HIDDEN), gathered));
        let mut work = b.work(n * ROWS_MAX, TOP_K.min(per_rank), SHAPE);
        b.receive(&rank.incoming, held, &mut work);
        b.gate_up(held, &mut work);
        b.down(held, &work, &mut rank.outgoing);
    }
    exchange(&mut cell, way, false)?;
    let mut residuals = Vec::new();
    for (rank, (_, x, routes, places)) in cell.iter_mut().zip(&mut state) {
        rank.backend.combine(&rank.incoming, routes, places, x);
        residuals.push(rank.backend.read(x).into_iter().map(f32::to_bits).collect());
        rank.backend.finish()?;
    }
    Ok(Outcome { residuals, received })
}

/// Any experts, all different.
fn anywhere(random: &mut Random) -> [usize; TOP_K] {
    let first = random.below(EXPERTS as u32) as usize;
    [first, (first + 1 + random.below(3) as usize) % EXPERTS, (first + 4 + random.below(3) as usize) % EXPERTS]
}

/// Rows of each rank, in every way that may be hard.
fn routings(n: usize) -> Vec<(usize, Routing)> {
    let mut random = Random(n as u64);
    let mut any = |rows: &[usize]| -> Routing {
        rows.iter().map(|&rows| (0..rows).map(|_| anywhere(&mut random)).collect()).collect()
    };
    let some: Vec<usize> = (0..n).map(|rank| 1 + 7 * rank).collect();
    let one: Vec<usize> = (0..n).map(|rank| if rank + 1 == n { ROWS_MAX } else { 0 }).collect();
    // The first ranks' experts are the lowest: all choices of all rows on rank 0.
    let skewed = vec![vec![[1, 0, 2]; 33]; n];
    vec![
        (32, any(&some)),
        (ROWS_MAX, any(&one)),
        (1, any(&vec![0; n])),
        (33, skewed),
        (8, any(&vec![8; n])),
        (2, any(&vec![2; n])),
    ]
}

/// The same bytes arrive and the same bits come out, whichever way: with rows nowhere or on one rank alone, with all on
/// one rank, and with slots that are just large enough.
#[test]
fn every_way_gives_the_same() {
    let devices = PRECISIONS.map(|precision| (Emulated::default(), precision));
    for (device, precision) in devices.into_iter().chain([(HOPPER, Precision::Fast)]) {
        for n in [1, 2, 4] {
            for (case, (slots, routing)) in routings(n).into_iter().enumerate() {
                let exact = layer_on(device, precision, &routing, Way::Exact).unwrap();
                for way in [Way::Slots(slots), Way::Gather(slots)] {
                    let other = layer_on(device, precision, &routing, way).unwrap();
                    assert!(other == exact, "{precision:?}, {n} ranks, case {case}, {way:?}");
                }
                assert_eq!(exact.residuals.iter().map(Vec::len).sum::<usize>() / HIDDEN, routing.concat().len());
            }
        }
    }
}

/// The ranks' number changes nothing either.
#[test]
fn one_rank_or_four_give_the_same() {
    let rows: Vec<_> = routings(4).remove(0).1;
    let four = layer(Precision::Fast, &rows, Way::Gather(32)).unwrap().residuals;
    // The rows' numbers are drawn rank by rank, so one rank has the same rows.
    let one = layer(Precision::Fast, &vec![rows.concat()], Way::Slots(ROWS_MAX)).err();
    assert!(one.is_some(), "46 rows are more than the slots hold");
    let one = layer(Precision::Fast, &vec![rows[..3].concat()], Way::Slots(ROWS_MAX)).unwrap().residuals;
    assert_eq!(one[0], four[..3].concat());
}

#[test]
fn a_row_too_many_for_a_slot_is_refused_and_not_dropped() {
    for way in [Way::Slots(32), Way::Gather(32)] {
        let refused = layer(Precision::Fast, &vec![vec![[1, 0, 2]; 33]; 2], way).unwrap_err();
        assert_eq!(refused, KernelError::Received { rank: 0, what: "more than a slot holds" }, "{way:?}");
    }
}

#[test]
fn a_slot_of_another_moment_exchange_or_rank_is_named_and_empty() {
    let mut backend = Cuda::new(Arc::new(Emulated::default()), Precision::Exact).unwrap();
    let mut port = Port::new(&backend, 1024).unwrap();
    let parts = backend.upload(&HostParts { by_rank: vec![vec![7; 8], vec![9; 16]] });
    let slot = Slot { bytes: 16, row_bytes: 8, exchange: 5 };
    let mut incoming = backend.parts(2, 64);
    // What rank 1 finds of two slots that rank `from` has packed at `moment`.
    let mut find = |from: u32, moment: [u64; 3], slot: Slot| {
        port.begin(moment).unwrap();
        let packed = port.pack(&parts, slot, from).unwrap();
        let landing = port.landing(&mut incoming, slot).unwrap();
        // SAFETY: both have room for two slots.
        unsafe { port.copy(packed, landing, 2 * slot.stride()).unwrap() };
        port.begin(MOMENT).unwrap();
        port.unpack(&mut incoming, Slot { row_bytes: 8, exchange: 5, ..slot }, None).unwrap();
        // What was found is there until the step ends, and is that step's alone.
        let looks = [port.look().unwrap(), port.end().unwrap(), port.end().unwrap()];
        assert!(looks.iter().all(|look| look.is_done().unwrap()));
        let [early, found, next] = looks.map(|look| port.seen(look));
        assert_eq!((&early, next), (&found, Ok(())));
        let empty = incoming.download().unwrap().by_rank.iter().map(Vec::len).collect::<Vec<_>>();
        (found.map_err(|error| error.to_string()), empty)
    };
    // Both slots name the same sender, so one of them is stray.
    let says = |found: Result<(), String>, what: &str| assert!(found.as_ref().unwrap_err().contains(what), "{found:?}");
    let (found, bytes) = find(0, MOMENT, slot);
    says(found, "another exchange or sender");
    assert_eq!(bytes, [8, 0]);
    let (found, bytes) = find(0, [3, 1 << 40, 76], slot);
    says(found, "another step");
    assert_eq!(bytes, [0, 0]);
    let (found, bytes) = find(1, MOMENT, Slot { exchange: 4, ..slot });
    says(found, "another exchange or sender");
    assert_eq!(bytes, [0, 0]);
}

/// Where results lie, a receive says: so none reads them as rows.
#[test]
fn results_are_no_rows() {
    let mut b = Cuda::new(Arc::new(HOPPER), Precision::Fast).unwrap();
    let _routes = b.routes(0, TOP_K);
    let (experts, mut work) = (b.experts(1, SHAPE), b.work(1, TOP_K, SHAPE));
    let (received, mut out) = (b.upload(&HostParts::new(1)), b.parts(1, TOP_K * b.combine_record(HIDDEN)));
    b.receive(&received, &experts, &mut work);
    b.down(&experts, &work, &mut out);
    b.finish().unwrap();
    b.receive(&out, &experts, &mut work);
    assert_eq!(b.finish(), Err(KernelError::Plan { what: "received rows", index: 0, len: 0 }), "no rank is to blame");
    // They may become rows again.
    out.upload(&HostParts::new(1)).unwrap();
    b.receive(&out, &experts, &mut work);
    b.finish().unwrap();
}

#[test]
fn without_room_nothing_is_enqueued() {
    let mut backend = Cuda::new(Arc::new(Emulated::default()), Precision::Exact).unwrap();
    let mut port = Port::new(&backend, 2 * (SLOT_HEADER + 16)).unwrap();
    let parts = backend.upload(&HostParts { by_rank: vec![vec![7; 8]; 2] });
    let is_size = |result: Result<u64, KernelError>| matches!(result, Err(KernelError::Size { .. }));
    let slot = Slot { bytes: 32, row_bytes: 8, exchange: 0 };
    assert!(is_size(port.pack(&parts, slot, 0)));
    assert!(is_size(port.pack(&parts, Slot { bytes: 8, ..slot }, 0)), "payloads begin on a border");
    let mut small = backend.parts(2, 8);
    assert!(is_size(port.landing(&mut small, slot)));
    assert!(is_size(port.room(&mut small, &[100, 100])));
    assert!(matches!(port.room(&mut small, &[1]), Err(KernelError::Plan { what: "rank", index: 1, len: 2 })));
    // What is on its way out stays where it is.
    let mut parts = parts;
    let taken = port.take(&parts);
    assert!(parts.upload(&HostParts::new(2)).is_err());
    drop(taken);
    parts.upload(&HostParts::new(2)).unwrap();
}
