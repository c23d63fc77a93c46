//! Draws to the device and what was drawn back.

use super::Cuda;
use super::device::{Buffer, Plain};
use super::inputs::Staging;
use super::ops::{Op, SAMPLE_CHANGE, SAMPLE_CUT, SAMPLE_DRAW, SAMPLE_LARGEST, SAMPLE_REPORT, SAMPLE_WEIGH, SampleArgs};
use super::rows::Rows;
use crate::cpu::{check, need};
use crate::random::uniform;
use crate::{Draw, KernelError, NO_SLOT, Sampled};

/// Rows drawn by one launch: each needs a copy of its logits.
pub(super) const ROWS: usize = 32;
/// Bytes of draws that one launch takes, unless a single draw has more.
pub(super) const DRAWS_BYTES: usize = 4 << 20;
/// Nothing is asked for, or nothing is given.
const NONE: u32 = u32::MAX;
/// Bytes of a draw, of an edit, of what was drawn, and of a likely token, as `csrc/sample.cu` has them.
pub(super) const DRAW: usize = 56;
pub(super) const EDIT: usize = 12;
pub(super) const DRAWN: usize = 24;
pub(super) const TOP: usize = 8;
/// Ids of a block, and of a thread, as `csrc/sample.cu` has them.
const CHUNK: usize = 512 * EACH;
const EACH: usize = 8;
/// Tokens up to which sums of weights hold.
const VOCAB_MAX: usize = 1 << 22;
/// Shared memory: sums, and a histogram of 11 bits or a list of a block's ids.
const SHARED: u32 = 160 + 2048 * 16;

/// Bytes of how many blocks of each row are done: at one place whatever the rows, since they stay 0 between kernels.
const DONE: usize = ROWS.next_multiple_of(4) * 4;

/// Bytes of what is kept of rows while they are drawn from: how many blocks are done, states, weights.
pub(super) const fn rows_bytes(rows: usize, vocab: usize) -> usize {
    DONE + rows * (state_bytes(vocab) + stride(vocab) * 4)
}

/// Bytes of a row's state: what it is, a histogram, a list, and a number of every block.
const fn state_bytes(vocab: usize) -> usize {
    64 + 2048 * 16 + 4096 * 8 + vocab.div_ceil(CHUNK).next_multiple_of(2) * 8
}

/// Weights of a row.
const fn stride(vocab: usize) -> usize {
    vocab.next_multiple_of(EACH)
}

/// What one launch drew, on the device: `[draws]` of what was drawn, then the likely tokens of all.
#[derive(Debug)]
pub(super) struct Drawn {
    buffer: Buffer,
    report: Report,
}

/// How what was drawn is read.
#[derive(Debug)]
pub(super) struct Report {
    /// Of each draw, whether something is reported, and where its likely tokens begin.
    reports: Vec<(bool, u32)>,
    tops: usize,
}

/// Draws as the kernel takes them.
#[derive(Default)]
struct Packed {
    draws: Vec<u8>,
    edits: Vec<u8>,
    allowed: Vec<u64>,
    reports: Vec<(bool, u32)>,
    tops: usize,
}

fn append<T: Plain>(out: &mut Vec<u8>, values: impl IntoIterator<Item = T>) {
    values.into_iter().for_each(|value| value.append(out));
}

impl Packed {
    fn new(draws: &[Draw], vocab: usize) -> Self {
        let mut packed = Self::default();
        for (row, draw) in draws.iter().enumerate() {
            // Blocks run in any order: of several draws into a slot, the last one counts.
            let last = !draws[row + 1..].iter().any(|later| later.slot == draw.slot);
            packed.push(draw, if last { draw.slot } else { NO_SLOT }, vocab);
        }
        packed
    }

    fn push(&mut self, draw: &Draw, slot: u32, vocab: usize) {
        let top = self.tops as u32;
        let edits = (self.edits.len() / EDIT) as u32;
        let allowed = self.allowed.len() as u32;
        let words = draw.allowed.as_ref().map_or(NONE, |words| words.len().min(vocab.div_ceil(64)) as u32);
        let logprobs = draw.logprobs.map_or(NONE, |count| (count as usize).min(vocab) as u32);
        append(&mut self.draws, [uniform(draw.seed, draw.choice, draw.position)]);
        append(&mut self.draws, [slot]);
        append(&mut self.draws, [draw.temperature, draw.top_p, draw.min_p]);
        append(&mut self.draws, [draw.top_k, edits, draw.edits.len() as u32, allowed, words, logprobs, top]);
        self.draws.resize(self.draws.len().next_multiple_of(8), 0);
        for edit in &draw.edits {
            append(&mut self.edits, [edit.token]);
            append(&mut self.edits, [edit.repetition, edit.add]);
        }
        if let Some(given) = &draw.allowed {
            self.allowed.extend_from_slice(&given[..words as usize]);
        }
        self.reports.push((draw.logprobs.is_some(), top));
        if logprobs != NONE {
            self.tops += logprobs as usize;
        }
    }
}

impl Cuda {
    pub(super) fn sample_rows(&mut self, logits: &Rows, draws: &[Draw]) -> Result<(), KernelError> {
        need("the draws of the logits", draws.len(), logits.len())?;
        for draw in draws {
            check("token slot", draw.slot as usize, self.tokens.bytes() / 4)?;
        }
        if draws.is_empty() {
            return Ok(());
        }
        let vocab = logits.cols();
        check("token", vocab.saturating_sub(1), VOCAB_MAX)?;
        self.weights.reserve(rows_bytes(draws.len().min(ROWS), vocab))?;
        let mut first = 0;
        while first < draws.len() {
            let count = at_once(&draws[first..], vocab);
            self.sample_at_once(logits, first, &draws[first..first + count])?;
            first += count;
        }
        Ok(())
    }

    /// Draws from rows of `logits` from `first` on, with one launch of each kernel that one of them needs.
    fn sample_at_once(&mut self, logits: &Rows, first: usize, draws: &[Draw]) -> Result<(), KernelError> {
        let vocab = logits.cols();
        let packed = Packed::new(draws, vocab);
        let mut staging = Staging::default();
        staging.push(packed.draws);
        let edits = staging.push(packed.edits);
        let allowed = staging.push(packed.allowed);
        let at = self.late.push(&staging.bytes)?;
        let report = Report { reports: packed.reports, tops: packed.tops };
        let buffer = self.memory.zeroed(report.bytes())?;
        let args = SampleArgs {
            logits: logits.address() + (first * vocab * 4) as u64,
            weights: self.weights.address() + (DONE + draws.len() * state_bytes(vocab)) as u64,
            states: self.weights.address() + DONE as u64,
            done: self.weights.address(),
            draws: at,
            edits: at + edits,
            allowed: at + allowed,
            drawn: buffer.address(),
            top: buffer.address() + (draws.len() * DRAWN) as u64,
            slots: self.tokens.address(),
            vocab: vocab as u32,
            stride: stride(vocab) as u32,
            state_bytes: state_bytes(vocab) as u32,
            unused: 0,
        };
        // Two blocks for each multiprocessor, no more than a row has chunks.
        let blocks = 2 * self.memory.queue.device().multiprocessors() as usize / draws.len();
        for (kernel, blocks) in kernels(draws, blocks.clamp(1, vocab.div_ceil(CHUNK).max(1))) {
            self.launch(kernel, [blocks as u32, draws.len() as u32, 1], SHARED, &args)?;
        }
        self.drawn.push(Drawn { buffer, report });
        Ok(())
    }
}

/// The kernels that these draws need, and how many blocks of each share a row.
fn kernels(draws: &[Draw], blocks: usize) -> impl Iterator<Item = (&'static Op<SampleArgs>, usize)> {
    let any = |what: fn(&Draw) -> bool| draws.iter().any(what);
    let random = any(|draw| draw.temperature > 0.0);
    let needed = [
        (&SAMPLE_CHANGE, blocks, any(|draw| !draw.edits.is_empty() || draw.allowed.is_some())),
        (&SAMPLE_LARGEST, blocks, true),
        (&SAMPLE_WEIGH, blocks, random),
        (&SAMPLE_CUT, blocks, any(|draw| draw.temperature > 0.0 && (draw.top_k > 0 || draw.top_p < 1.0))),
        (&SAMPLE_DRAW, blocks, random),
        (&SAMPLE_REPORT, 1, any(|draw| draw.logprobs.is_some())),
    ];
    needed.into_iter().filter_map(|(kernel, blocks, is_needed)| is_needed.then_some((kernel, blocks)))
}

/// How many of these draws one launch takes: at least one, and no more bytes than [`DRAWS_BYTES`] where that is so.
fn at_once(draws: &[Draw], vocab: usize) -> usize {
    let words = |draw: &Draw| draw.allowed.as_ref().map_or(0, |words| words.len().min(vocab.div_ceil(64)));
    let mut bytes = 4 * 16;
    let fits = |draw: &&Draw| {
        bytes += DRAW + draw.edits.len() * EDIT + words(draw) * 8;
        bytes <= DRAWS_BYTES
    };
    draws.iter().take(ROWS).take_while(fits).count().max(1)
}

impl Drawn {
    /// Where it is, and how many bytes.
    pub(super) const fn part(&self) -> (&Buffer, usize) {
        (&self.buffer, self.report.bytes())
    }

    /// Gives the memory back.
    pub(super) fn into_report(self) -> Report {
        self.report
    }
}

impl Report {
    pub(super) const fn bytes(&self) -> usize {
        self.reports.len() * DRAWN + self.tops * TOP
    }

    /// What was drawn, from its bytes.
    pub(super) fn read(&self, bytes: &[u8]) -> Vec<Sampled> {
        let (drawn, top) = bytes.split_at_checked(self.reports.len() * DRAWN).unwrap_or_default();
        let one = |(drawn, &(reported, first)): (&[u8; DRAWN], &(bool, u32))| {
            let word = |i: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| drawn[i * 4 + byte]));
            let token = word(0);
            if !reported {
                return Sampled { token, ..Sampled::default() };
            }
            let sum = f64::from_bits(u64::from(word(4)) | u64::from(word(5)) << 32);
            let (largest, log_sum) = (f64::from(f32::from_bits(word(3))), sum.ln());
            let logprob = |logit: f32| (f64::from(logit) - largest - log_sum) as f32;
            let likely = top.as_chunks::<TOP>().0.iter().skip(first as usize).take(word(1) as usize);
            let mut likely: Vec<(u32, f32)> = likely
                .map(|bytes| {
                    let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| bytes[at + byte]));
                    (word(0), f32::from_bits(word(4)))
                })
                .collect();
            // In any order until now; no logit of them is NaN.
            likely.sort_by(|a, b| b.1.partial_cmp(&a.1).unwrap_or(std::cmp::Ordering::Equal).then(a.0.cmp(&b.0)));
            likely.iter_mut().for_each(|(_, logit)| *logit = logprob(*logit));
            Sampled { token, logprob: logprob(f32::from_bits(word(2))), top: likely }
        };
        drawn.as_chunks::<DRAWN>().0.iter().zip(&self.reports).map(one).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Edit;

    #[test]
    fn a_launch_takes_no_more_draws_than_there_is_room_for() {
        let edits =
            |count| Draw { edits: vec![Edit { token: 3, repetition: 2.0, add: 1.0 }; count], ..Draw::greedy(0, 0) };
        let allowed = Draw { allowed: Some(vec![0; 1 << 20].into()), ..Draw::greedy(0, 0) };
        assert_eq!(at_once(&vec![edits(0); ROWS + 1], 100), ROWS);
        assert_eq!(at_once(&[edits(100_000), edits(200_000), edits(100_000)], 100), 2);
        // One is drawn whatever its size.
        assert_eq!(at_once(&[edits(1_000_000), edits(0)], 100), 1);
        // Words beyond the vocabulary are left out.
        assert_eq!(at_once(&vec![allowed.clone(); 4], 100), 4);
        assert_eq!(at_once(&vec![allowed; 4], 64 << 18), 1);
        for draws in [vec![edits(100_000), edits(200_000)], vec![edits(7); ROWS]] {
            let packed = Packed::new(&draws, 100);
            assert!(packed.draws.len() + packed.edits.len() + packed.allowed.len() * 8 + 4 * 16 <= DRAWS_BYTES);
        }
    }

    #[test]
    fn draws_are_packed_as_the_kernel_reads_them() {
        let edits = vec![Edit { token: 3, repetition: 2.0, add: 1.0 }; 2];
        let first = Draw { edits, logprobs: Some(7), ..Draw::greedy(5, 9) };
        let second = Draw { allowed: Some(vec![1, 2, 3].into()), logprobs: Some(0), ..Draw::greedy(5, 9) };
        let packed = Packed::new(&[first, second.clone(), Draw { slot: 4, ..second }], 100);
        assert_eq!(packed.draws.len(), 3 * DRAW);
        let word = |draw: usize, i: usize| {
            u32::from_le_bytes([0, 1, 2, 3].map(|byte| packed.draws[draw * DRAW + 8 + i * 4 + byte]))
        };
        // Slots: only the last draw into a slot writes it.
        assert_eq!([word(0, 0), word(1, 0), word(2, 0)], [NO_SLOT, 5, 4]);
        // Edits: where and how many; words of the allowed, no more than the vocabulary has; likely tokens.
        assert_eq!([word(0, 5), word(0, 6), word(1, 5), word(1, 6)], [0, 2, 2, 0]);
        assert_eq!([word(0, 8), word(1, 7), word(1, 8), word(2, 7)], [NONE, 0, 2, 2]);
        assert_eq!([word(0, 9), word(1, 9), word(0, 10), word(1, 10)], [7, 0, 0, 7]);
        assert_eq!(packed.edits.len(), 2 * EDIT);
        assert_eq!(packed.allowed, [1, 2, 1, 2]);
    }
}
