//! Which bytes go where in an exchange; pure, the same rule on every rank.
//!
//! NCCL joins the n-th send from one rank to another with the n-th receive there, and neither side learns the other's
//! size: ranks that disagree hang, or write beyond a buffer. So both sides of a transfer come from one rule, and a
//! transfer of no bytes is left out on both.

/// A send or a receive.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From this rank to the peer.
    Send,
    /// From the peer to this rank.
    Receive,
}

/// One transfer with a peer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Transfer {
    /// Which way.
    pub direction: Direction,
    /// The other rank.
    pub peer: usize,
    /// Where its bytes begin, in the buffer of what is sent or of what is received.
    pub at: usize,
    /// How many they are, at least 1.
    pub bytes: usize,
}

/// Parts of known sizes: each rank sends its part for every other. `sent` and `received` are the bytes to and from each
/// rank, `[ranks]`, this one's too; parts lie one after the other, each on a border of `align` bytes.
///
/// Peers are taken in rings, nearest first, so that at no time all ranks send to the same one.
#[must_use]
pub fn all_to_all(me: usize, sent: &[usize], received: &[usize], align: usize) -> Vec<Transfer> {
    let (from, into) = (starts(sent, align), starts(received, align));
    let ranks = sent.len();
    let mut transfers = Vec::with_capacity(2 * ranks);
    for distance in 1..ranks {
        let (to, of) = ((me + distance) % ranks, (me + ranks - distance) % ranks);
        transfers.push(Transfer { direction: Direction::Send, peer: to, at: from[to], bytes: sent[to] });
        transfers.push(Transfer { direction: Direction::Receive, peer: of, at: into[of], bytes: received[of] });
    }
    transfers.retain(|transfer| transfer.bytes > 0);
    transfers
}

/// Slots of one size, whatever is in them: sizes stay on the device, so a captured graph may hold the exchange.
#[must_use]
pub fn fixed(me: usize, ranks: usize, slot_bytes: usize) -> Vec<Transfer> {
    let slots = vec![slot_bytes; ranks];
    all_to_all(me, &slots, &slots, 1)
}

/// Where each part begins, `[ranks]`.
#[must_use]
pub fn starts(bytes: &[usize], align: usize) -> Vec<usize> {
    let next = |at: &mut usize, bytes: &usize| {
        let start = *at;
        *at = (start + bytes).next_multiple_of(align.max(1));
        Some(start)
    };
    bytes.iter().scan(0, next).collect()
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests")]

    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// Runs all ranks' schedules as NCCL does: the n-th send to a rank meets the n-th receive from there.
    /// Gives the bytes that went from each rank to each other.
    fn meet(schedules: &[Vec<Transfer>]) -> BTreeMap<(usize, usize), usize> {
        let of = |rank: usize, peer: usize, direction: Direction| {
            let between = move |t: &&Transfer| t.peer == peer && t.direction == direction;
            schedules[rank].iter().filter(between).map(|t| t.bytes).collect::<Vec<_>>()
        };
        let mut moved = BTreeMap::new();
        for from in 0..schedules.len() {
            for to in 0..schedules.len() {
                let (sends, receives) = (of(from, to, Direction::Send), of(to, from, Direction::Receive));
                assert_eq!(sends, receives, "{from} to {to}");
                moved.insert((from, to), sends.iter().sum());
            }
        }
        moved
    }

    fn matrix() -> impl Strategy<Value = Vec<Vec<usize>>> {
        let count = prop_oneof![Just(0), 1_usize..50];
        (1_usize..9).prop_flat_map(move |n| prop::collection::vec(prop::collection::vec(count.clone(), n), n))
    }

    fn schedules(bytes: &[Vec<usize>], align: usize) -> Vec<Vec<Transfer>> {
        let column = |to: usize| bytes.iter().map(|row| row[to]).collect::<Vec<_>>();
        (0..bytes.len()).map(|me| all_to_all(me, &bytes[me], &column(me), align)).collect()
    }

    proptest! {
        #[test]
        fn every_send_meets_a_receive_of_its_size(bytes in matrix()) {
            let all = schedules(&bytes, 16);
            prop_assert!(all.iter().flatten().all(|transfer| transfer.bytes > 0));
            for ((from, to), moved) in meet(&all) {
                prop_assert_eq!(moved, if from == to { 0 } else { bytes[from][to] });
            }
        }

        /// Rows with a top-k spread over ranks: a row goes once to each other rank that holds one of its experts, and
        /// one row for each of its experts there comes back.
        #[test]
        fn bytes_are_those_of_the_copies(
            ranks in 1_usize..7,
            rows in prop::collection::vec((0_usize..7, prop::collection::vec(0_usize..64, 4)), 0..40),
        ) {
            const RECORD: usize = 24;
            const RESULT: usize = 16;
            let (mut there, mut back) = (vec![vec![0; ranks]; ranks], vec![vec![0; ranks]; ranks]);
            let (mut copies, mut choices) = (0, 0);
            for (home, experts) in &rows {
                let home = home % ranks;
                let mut visited: Vec<usize> = experts.iter().map(|expert| expert % ranks).collect();
                for &rank in &visited {
                    back[rank][home] += RESULT;
                    choices += usize::from(rank != home);
                }
                visited.sort_unstable();
                visited.dedup();
                for &rank in &visited {
                    there[home][rank] += RECORD;
                    copies += usize::from(rank != home);
                }
            }
            let total = |bytes: &[Vec<usize>]| meet(&schedules(bytes, 4)).values().sum::<usize>();
            prop_assert_eq!(total(&there), copies * RECORD);
            prop_assert_eq!(total(&back), choices * RESULT);
        }

        #[test]
        fn parts_neither_overlap_nor_leave_their_border(bytes in matrix(), shift in 0_u32..7) {
            let align = 1 << shift;
            for (me, schedule) in schedules(&bytes, align).iter().enumerate() {
                let received: Vec<usize> = bytes.iter().map(|row| row[me]).collect();
                for (direction, sizes) in [(Direction::Send, &bytes[me]), (Direction::Receive, &received)] {
                    let starts = starts(sizes, align);
                    for (rank, &start) in starts.iter().enumerate() {
                        prop_assert_eq!(start % align, 0);
                        let next = starts.get(rank + 1).copied().unwrap_or(usize::MAX);
                        prop_assert!(start + sizes[rank] <= next);
                    }
                    for transfer in schedule.iter().filter(|t| t.direction == direction) {
                        prop_assert_eq!((transfer.at, transfer.bytes), (starts[transfer.peer], sizes[transfer.peer]));
                    }
                }
            }
        }

        #[test]
        fn slots_are_sent_whole_whatever_is_in_them(ranks in 1_usize..9, slot in 1_usize..100) {
            let schedules: Vec<_> = (0..ranks).map(|me| fixed(me, ranks, slot)).collect();
            for ((from, to), moved) in meet(&schedules) {
                prop_assert_eq!(moved, if from == to { 0 } else { slot });
            }
        }
    }

    #[test]
    fn no_rank_is_sent_to_by_all_at_once() {
        let schedules: Vec<_> = (0..5).map(|me| fixed(me, 5, 8)).collect();
        for turn in 0..4 {
            let nth = |schedule: &Vec<Transfer>| {
                schedule.iter().filter(|t| t.direction == Direction::Send).nth(turn).unwrap().peer
            };
            let mut targets: Vec<usize> = schedules.iter().map(nth).collect();
            targets.sort_unstable();
            assert_eq!(targets, [0, 1, 2, 3, 4]);
        }
    }
}
