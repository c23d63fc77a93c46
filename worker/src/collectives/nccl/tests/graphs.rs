//! Exchanges within graphs over the stand-in: what is called for, and what becomes of graphs when a rank fails.

use std::sync::atomic::Ordering;

use super::ways_captured::{Member, Routing, WAYS, any, cell};
use super::*;

const LAYERS: u32 = 3;

fn world(member: &Member) -> Arc<Mutex<World>> {
    fake::world_of(member.nccl.communicator().raw())
}

/// Begins step 3, in which exchanges go as they were captured in the two before.
fn begin_captured(member: &mut Member, routing: &Routing, way: Way) {
    for step in [1, 2] {
        member.step(step, routing, Some(way), LAYERS).unwrap();
    }
    member.begin(3, Instant::now() + PATIENCE, routing, Some(way));
}

#[test]
fn an_exchange_is_called_for_twice_and_then_goes_with_the_graphs() {
    let routing = any(7, &[5, 3, 2]);
    let ranks = routing.len();
    for way in WAYS {
        let ended = cell(&routing, |mut member| {
            let world = world(&member);
            // NCCL puts its work on the stream later.
            fake::lock(&world).faults(member.nccl.rank().index()).slow = 3;
            let [.., before, after] = [1, 2, 3, 4].map(|step| {
                member.step(step, &routing, Some(way), LAYERS).unwrap();
                member.backend.counts().graphs
            });
            assert!(after > before, "{way:?}");
            world
        });
        clean(&ended[0], ranks);
        let world = fake::lock(&ended[0]);
        // One dispatch and one combine of the first step, and each of them once more to be captured.
        assert_eq!((world.called, world.captured), (4 * ranks, 2 * ranks), "{way:?}");
    }
}

#[test]
fn graphs_go_before_the_communicator_that_they_call_when_a_rank_dies() {
    let routing = any(8, &[2, 3, 1]);
    for way in WAYS {
        let ended = cell(&routing, |mut member| {
            let world = world(&member);
            begin_captured(&mut member, &routing, way);
            if member.nccl.rank() == Rank(1) {
                return world;
            }
            let graphs = member.backend.counts().graphs;
            member.dispatch(0).and_then(|()| member.experts_and_combine(0)).unwrap();
            assert!(member.backend.counts().graphs > graphs, "{way:?}: no graph is in flight");
            let error = member.settle().unwrap_err();
            assert!(matches!(error, CollectiveError::Lost { rank: Rank(1), .. }), "{way:?}: {error}");
            assert_eq!(member.nccl.communicator().state(), State::Aborted);
            world
        });
        clean(&ended[0], routing.len());
    }
}

/// What was recorded of an exchange and not yet submitted is never done once its communicator has ended.
#[test]
fn what_is_recorded_of_a_communicator_that_ends_is_left_out() {
    let routing = any(8, &[2, 3]);
    for way in WAYS {
        let ended = cell(&routing, |mut member| {
            let world = world(&member);
            begin_captured(&mut member, &routing, way);
            member.dispatch(0).unwrap();
            let Member { nccl, mut backend, .. } = member;
            drop(nccl);
            backend.submit().unwrap();
            world
        });
        clean(&ended[0], routing.len());
    }
}

/// NCCL waits for a rank that is gone, from a thread of its own, while it is captured.
#[test]
fn a_rank_that_dies_while_an_exchange_is_captured_is_named() {
    let routing = any(8, &[2, 3]);
    for way in WAYS {
        let errors = cell(&routing, |mut member| {
            let world = world(&member);
            member.begin(1, Instant::now() + PATIENCE, &routing, Some(way));
            member.dispatch(0).and_then(|()| member.experts_and_combine(0)).unwrap();
            if member.nccl.rank() == Rank(1) {
                member.settle().unwrap();
                return None;
            }
            member.settle().unwrap();
            fake::lock(&world).faults(0).slow = u32::MAX;
            member.begin(2, Instant::now() + PATIENCE, &routing, Some(way));
            Some(member.dispatch(0).unwrap_err())
        });
        let error = errors[0].as_ref().unwrap();
        assert!(matches!(error, CollectiveError::Lost { rank: Rank(1), .. }), "{way:?}: {error}");
    }
}

#[test]
fn an_exchange_that_is_captured_for_ever_ends_with_the_deadline() {
    let routing = any(8, &[2, 3]);
    let over = std::sync::Barrier::new(2);
    let errors = cell(&routing, |mut member| {
        let world = world(&member);
        member.begin(1, Instant::now() + PATIENCE, &routing, Some(WAYS[0]));
        member.dispatch(0).and_then(|()| member.experts_and_combine(0)).unwrap();
        member.settle().unwrap();
        let error = (member.nccl.rank() == Rank(0)).then(|| {
            fake::lock(&world).faults(0).slow = u32::MAX;
            member.begin(2, Instant::now() + Duration::from_millis(50), &routing, Some(WAYS[0]));
            member.dispatch(0).unwrap_err()
        });
        over.wait();
        error
    });
    let late = matches!(&errors[0], Some(CollectiveError::Deadline { waiting_for, .. }) if *waiting_for == [Rank(1)]);
    assert!(late, "{errors:?}");
}

#[test]
fn a_device_that_captures_nothing_says_how_to_go_on() {
    let routing = any(9, &[2, 3]);
    let errors = cell(&routing, |mut member| {
        member.device.as_ref().unwrap().no_captures.store(true, Ordering::SeqCst);
        member.step(1, &routing, Some(WAYS[0]), 2).unwrap_err()
    });
    let own = errors.iter().filter(|error| matches!(error, CollectiveError::Device { .. })).count();
    assert!(own > 0, "{errors:?}");
    for error in errors {
        let CollectiveError::Device { error, .. } = error else { continue };
        assert!(error.to_string().contains("start workers with --exchange nccl"), "{error}");
    }
}
