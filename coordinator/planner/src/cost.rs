//! How long a step takes at least, and how long a rank may be waited for.
//!
//! Each part of a step moves bytes and does operations; it cannot end before the slower of the two has:
//! `max(bytes / bandwidth, flops / (flops / s))`. Parts follow each other, so a step takes their sum. Ranks march in
//! lockstep: whoever is early waits in the exchange. Shape letters as everywhere: `T` rows, `H` `Nq` `Nkv` `D` `E` `K`
//! `I` `V`; `b` bytes of a number, `L` layers, `R` ranks. For each rank and layer:
//!
//! | part | bytes | flops |
//! |---|---|---|
//! | projections | `(H (Nq + 2 Nkv) D + Nq D H) b` | `2 T` for each weight |
//! | attention | `2 Nkv D b` for each position of a sequence, once for all its rows | `4 Nq D` for each row and position |
//! | router | `H E b` | `2 T H E` |
//! | experts | `S (1 - (1 - K/E)^T')` times `3 H I` weights of 17/32 B and `2I + H` biases of 2 B | `6 H I K T' S/E` |
//!
//! with `S = ceil(E / R)` experts on the fullest rank and `T'` the rows of all ranks: routing is taken as uniform, and
//! the number of distinct experts as its expectation. Once a step the unembedding reads `V H b` and does `2 V H` for each
//! row that asks for logits.
//!
//! A row goes once to each other rank that holds one of its experts, `(R - 1) (1 - C(E - S, K) / C(E, K))` copies, and
//! `K (R - 1) / R` rows come back for it. An exchange takes its latency and then the bytes of the rank that sends or
//! receives most.
//!
//! Pure: no clock. Measured times come in ([`Calibrated::observe`]).
//!
//= arXiv:2211.05102 (Efficiently Scaling Transformer Inference: costs of a step as bytes and operations)

use phalanx_proto::{LayerKind, Layout, ModelConfig, Phase, PhaseTimes};

/// What a rank runs on. A preset states what copies and large products reach, not what is printed on the box.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// Bytes read from memory in a second.
    pub bandwidth: f64,
    /// Operations in a second, a multiplication and an addition counted as two.
    pub flops: f64,
    /// Bytes that a rank sends to others in a second; it receives as many at the same time.
    pub link_bandwidth: f64,
    /// Seconds until the first byte of an exchange is there.
    pub link_latency: f64,
    /// Seconds of a step in which nothing is computed.
    pub step_overhead: f64,
}

impl Hardware {
    /// An H100 with 80 GB on NVLink.
    pub const H100: Self =
        Self { bandwidth: 3.0e12, flops: 800e12, link_bandwidth: 450e9, link_latency: 10e-6, step_overhead: 50e-6 };
    /// An H200 on NVLink: an H100 with faster memory.
    pub const H200: Self = Self { bandwidth: 4.3e12, ..Self::H100 };
    /// Two cores with AVX-512 and VNNI, and ranks that speak TCP over loopback.
    pub const CPU_2_CORES: Self =
        Self { bandwidth: 47e9, flops: 940e9, link_bandwidth: 2e9, link_latency: 50e-6, step_overhead: 200e-6 };
}

/// Bytes of a number, by what it is. Experts are always MXFP4 with biases in bf16.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Formats {
    /// A dense weight.
    pub dense: f64,
    /// A key or value.
    pub kv: f64,
    /// A number on its way between ranks.
    pub wire: f64,
}

impl Formats {
    /// bf16 everywhere.
    pub const BF16: Self = Self { dense: 2.0, kv: 2.0, wire: 2.0 };
    /// Dense weights as 32 int8 and a scale of 2 bytes.
    pub const Q8: Self = Self { dense: 34.0 / 32.0, ..Self::BF16 };
}

/// What attention reads and does in the layers of one kind.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reads {
    /// Positions whose keys and values are read: summed over sequences, once for all rows of a sequence.
    pub positions: u64,
    /// Pairs of a row and a position that it sees.
    pub pairs: u64,
}

/// What one rank does in one step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RankShape {
    /// `T`.
    pub rows: u64,
    /// Rows whose logits are computed.
    pub sampled: u64,
    /// In full layers.
    pub full: Reads,
    /// In sliding layers.
    pub sliding: Reads,
}

impl RankShape {
    /// Adds a run of `rows` rows of one sequence from position `start` on, of which `sampled` give logits. `window` is
    /// the model's.
    pub fn add_run(&mut self, start: u32, rows: u32, sampled: u32, window: u32) {
        let (start, rows, window) = (u64::from(start), u64::from(rows), u64::from(window));
        if rows == 0 {
            return;
        }
        // A row at position p sees p + 1 positions. O(1): the rows below the window's width, then the others.
        let pairs_below = |end: u64| end * (end + 1) / 2;
        let ramp_end = (start + rows).min(window).max(start);
        let ramp = pairs_below(ramp_end) - pairs_below(start);
        self.rows += rows;
        self.sampled += u64::from(sampled);
        self.full.positions += start + rows;
        self.full.pairs += pairs_below(start + rows) - pairs_below(start);
        self.sliding.positions += (start + rows).min(rows + window - 1);
        self.sliding.pairs += ramp + (start + rows - ramp_end) * window;
    }
}

/// What all ranks do in one step, `[R]`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StepShape(pub Vec<RankShape>);

/// Seconds of each phase, in the order of [`Phase::ALL`].
pub type PhaseSeconds = [f64; Phase::ALL.len()];

/// Bytes moved and operations done.
#[derive(Clone, Copy, Debug, Default)]
struct Effort {
    bytes: f64,
    flops: f64,
}

/// The cost of steps of one model on one layout and hardware. See the [module](self) for the formulas.
#[derive(Clone, Debug, PartialEq)]
pub struct Cost {
    hardware: Hardware,
    formats: Formats,
    ranks: f64,
    layers: f64,
    /// `L` times the weights of the joint projection of q, k and v and of the projection of the heads.
    projections: f64,
    /// `L H E`.
    router: f64,
    /// `2 Nkv D` times the layers of a kind: numbers of one position. Full, sliding.
    kv_numbers: [f64; 2],
    /// `4 Nq D` times the layers of a kind. Full, sliding.
    attention_flops: [f64; 2],
    experts: f64,
    /// `S`.
    slots: f64,
    top_k: f64,
    /// Bytes of an expert in all layers.
    expert_bytes: f64,
    /// `L 6 H I`.
    expert_flops: f64,
    vocab: f64,
    hidden: f64,
    /// Other ranks that a row goes to.
    copies: f64,
}

impl Cost {
    /// The cost of steps of `model`, divided as `layout` says, every rank on `hardware`.
    #[must_use]
    pub fn new(model: &ModelConfig, layout: Layout, formats: Formats, hardware: Hardware) -> Self {
        let n = |v: u32| f64::from(v);
        let (h, i, d) = (n(model.hidden), n(model.intermediate), n(model.head_dim));
        let layers = model.layers.len() as f64;
        let slots = model.experts.div_ceil(layout.ep);
        let of_kinds = |number: f64| [LayerKind::Full, LayerKind::Sliding].map(|k| number * n(model.layers_of(k)));
        // C(E - S, K) / C(E, K): none of a row's K experts is among the S of a rank.
        let elsewhere = |j: u32| n((model.experts - slots).saturating_sub(j)) / n(model.experts - j);
        let none: f64 = (0..model.top_k).map(elsewhere).product();
        Self {
            hardware,
            formats,
            ranks: n(layout.ep),
            layers,
            projections: layers * h * (n(model.qkv_width()) + n(model.attention_width())),
            router: layers * h * n(model.experts),
            kv_numbers: of_kinds(2.0 * n(model.kv_heads) * d),
            attention_flops: of_kinds(4.0 * n(model.heads) * d),
            experts: n(model.experts),
            slots: n(slots),
            top_k: n(model.top_k),
            expert_bytes: layers * (3.0 * h * i * 17.0 / 32.0 + (2.0 * i + h) * 2.0),
            expert_flops: layers * 6.0 * h * i,
            vocab: n(model.vocab),
            hidden: h,
            copies: n(layout.ep - 1) * (1.0 - none),
        }
    }

    /// Other ranks that a row is sent to in a layer, on average.
    #[must_use]
    pub const fn copies(&self) -> f64 {
        self.copies
    }

    /// Distinct experts of a layer that `rows` rows are expected to visit, of all ranks: `E (1 - (1 - K/E)^rows)`.
    #[must_use]
    pub fn distinct_experts(&self, rows: u64) -> f64 {
        self.experts * (1.0 - (1.0 - self.top_k / self.experts).powf(rows as f64))
    }

    /// Seconds that a step takes: of the rank that is done last.
    #[must_use]
    pub fn step_seconds(&self, shape: &StepShape) -> f64 {
        self.phases(shape).iter().map(|phases| phases.iter().sum()).fold(0.0, f64::max)
    }

    /// Seconds of each phase on each rank, `[R]`; waits for others count as part of the exchange, as they are measured.
    /// O(R).
    #[must_use]
    pub fn phases(&self, shape: &StepShape) -> Vec<PhaseSeconds> {
        self.phases_of(&shape.0, shape.0.iter().map(|rank| rank.rows).sum()).collect()
    }

    /// Seconds of each phase on some ranks, if all ranks together have so many rows.
    fn phases_of(&self, ranks: &[RankShape], all_rows: u64) -> impl Iterator<Item = PhaseSeconds> {
        let most_rows = ranks.iter().map(|rank| rank.rows).max().unwrap_or(0);
        let experts = self.seconds(self.experts_of(all_rows));
        let (dispatch, combine) = self.exchange(most_rows, all_rows);
        let before = move |rank: &RankShape| {
            let [projections, attention, router] = self.before_exchange(rank).map(|part| self.seconds(part));
            (projections + attention, router)
        };
        let slowest = ranks.iter().map(|rank| before(rank).0 + before(rank).1).fold(0.0, f64::max);
        let of_rank = move |rank: &RankShape| {
            let (attention, router) = before(rank);
            let wait = slowest - attention - router;
            let mut phases = PhaseSeconds::default();
            phases[Phase::Input as usize] = self.hardware.step_overhead;
            phases[Phase::Attention as usize] = attention;
            phases[Phase::Router as usize] = router;
            phases[Phase::Dispatch as usize] = wait + dispatch;
            phases[Phase::Experts as usize] = experts;
            phases[Phase::Combine as usize] = combine;
            phases[Phase::Unembed as usize] = self.seconds(self.unembed(rank.sampled));
            let logits = rank.sampled as f64 * self.vocab * 4.0;
            phases[Phase::Sample as usize] = logits / self.hardware.bandwidth;
            phases
        };
        ranks.iter().map(of_rank)
    }

    fn seconds(&self, effort: Effort) -> f64 {
        (effort.bytes / self.hardware.bandwidth).max(effort.flops / self.hardware.flops)
    }

    /// Projections, attention, router.
    fn before_exchange(&self, rank: &RankShape) -> [Effort; 3] {
        if rank.rows == 0 {
            return [Effort::default(); 3];
        }
        let rows = rank.rows as f64;
        let dense = |weights: f64| Effort { bytes: weights * self.formats.dense, flops: 2.0 * rows * weights };
        let [kv_full, kv_sliding] = self.kv_numbers.map(|numbers| numbers * self.formats.kv);
        let [flops_full, flops_sliding] = self.attention_flops;
        let attention = Effort {
            bytes: rank.full.positions as f64 * kv_full + rank.sliding.positions as f64 * kv_sliding,
            flops: rank.full.pairs as f64 * flops_full + rank.sliding.pairs as f64 * flops_sliding,
        };
        [dense(self.projections), attention, dense(self.router)]
    }

    /// The experts of the fullest rank, which rows of all ranks visit.
    fn experts_of(&self, all_rows: u64) -> Effort {
        let share = self.slots / self.experts;
        Effort {
            bytes: self.distinct_experts(all_rows) * share * self.expert_bytes,
            flops: all_rows as f64 * self.top_k * share * self.expert_flops,
        }
    }

    fn unembed(&self, sampled: u64) -> Effort {
        if sampled == 0 {
            return Effort::default();
        }
        let weights = self.vocab * self.hidden;
        Effort { bytes: weights * self.formats.dense, flops: 2.0 * sampled as f64 * weights }
    }

    /// Seconds of dispatch and combine, waits apart.
    fn exchange(&self, most_rows: u64, all_rows: u64) -> (f64, f64) {
        if self.ranks <= 1.0 {
            return (0.0, 0.0);
        }
        let (most, all) = (most_rows as f64, all_rows as f64);
        let row = self.hidden * self.formats.wire / self.hardware.link_bandwidth;
        let seconds = |copies: f64| {
            // The fullest rank sends `most * copies`; a rank receives its share of what the emptier ones send.
            let received = all * copies / self.ranks;
            self.layers * (self.hardware.link_latency + (most * copies).max(received) * row)
        };
        (seconds(self.copies), seconds(self.top_k * (self.ranks - 1.0) / self.ranks))
    }
}

/// How far a step may exceed its prediction before a rank counts as lost.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DeadlineRule {
    /// Times the predicted step.
    pub factor: f64,
    /// Milliseconds at least: what a busy machine may lose without being broken.
    pub min_ms: u32,
    /// Milliseconds at most. Prompts are read in chunks that are small enough for it.
    pub max_ms: u32,
}

/// A cost model that has been told what steps took.
#[derive(Clone, Debug)]
pub struct Calibrated {
    cost: Cost,
    rule: DeadlineRule,
    /// Decaying sums of seconds, for each phase.
    measured: PhaseSeconds,
    predicted: PhaseSeconds,
}

impl Calibrated {
    /// A result's weight has halved after about 44 further ones.
    const KEPT: f64 = 1.0 - 1.0 / 64.0;
    /// The ratio of a phase stays within these bounds: one absurd clock must not end or suspend all deadlines.
    pub const RATIOS: std::ops::RangeInclusive<f64> = 0.125..=1024.0;

    /// Nothing measured yet: every ratio is 1.
    #[must_use]
    pub const fn new(cost: Cost, rule: DeadlineRule) -> Self {
        Self { cost, rule, measured: [0.0; Phase::ALL.len()], predicted: [0.0; Phase::ALL.len()] }
    }

    /// The cost model without what was measured.
    #[must_use]
    pub const fn cost(&self) -> &Cost {
        &self.cost
    }

    /// Takes what a rank measured in a step for which [`Cost::phases`] had predicted this. O(1).
    pub fn observe(&mut self, predicted: &PhaseSeconds, times: &PhaseTimes) {
        for (phase, &seconds) in Phase::ALL.into_iter().zip(predicted) {
            let at = phase as usize;
            if seconds > 0.0 {
                self.measured[at] = self.measured[at] * Self::KEPT + times.get(phase) as f64 * 1e-6;
                self.predicted[at] = self.predicted[at] * Self::KEPT + seconds;
            }
        }
    }

    /// What a phase took over what was predicted, lately.
    #[must_use]
    pub fn ratio(&self, phase: Phase) -> f64 {
        let (measured, predicted) = (self.measured[phase as usize], self.predicted[phase as usize]);
        if predicted > 0.0 { (measured / predicted).clamp(*Self::RATIOS.start(), *Self::RATIOS.end()) } else { 1.0 }
    }

    /// Seconds that a step will take, by what steps took lately.
    #[must_use]
    pub fn step_seconds(&self, shape: &StepShape) -> f64 {
        let ratios = Phase::ALL.map(|phase| self.ratio(phase));
        let of_rank = |phases: &PhaseSeconds| phases.iter().zip(ratios).map(|(seconds, ratio)| seconds * ratio).sum();
        self.cost.phases(shape).iter().map(of_rank).fold(0.0, f64::max)
    }

    /// Whether a step in which every rank does as much as this one is over long before the longest deadline, by what
    /// steps took lately. A phase of which nothing is known may be as slow as is believed at all. O(1).
    #[must_use]
    pub fn is_short(&self, rank: &RankShape) -> bool {
        let ratio = |phase| {
            if self.predicted[phase as usize] > 0.0 { self.ratio(phase) } else { *Self::RATIOS.end() }
        };
        let ratios = Phase::ALL.map(ratio);
        let all_rows = rank.rows * self.cost.ranks as u64;
        let phases = self.cost.phases_of(std::slice::from_ref(rank), all_rows);
        let seconds: f64 = phases.flat_map(|phases| phases.into_iter().zip(ratios)).map(|(s, ratio)| s * ratio).sum();
        seconds * self.rule.factor * 1e3 <= f64::from(self.rule.max_ms)
    }

    /// Milliseconds after which a wait within a step of this shape counts as a failure.
    #[must_use]
    pub fn deadline(&self, shape: &StepShape) -> u32 {
        let DeadlineRule { factor, min_ms, max_ms } = self.rule;
        let milliseconds = (self.step_seconds(shape) * factor * 1e3).ceil();
        // `as` saturates, and what is not a number becomes 0.
        (milliseconds as u32).max(min_ms).min(max_ms)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use phalanx_proto::Rope;

    fn gpt_oss(layers: usize, experts: u32) -> ModelConfig {
        let rope = Rope {
            theta: 150_000.0,
            factor: 32.0,
            beta_fast: 32.0,
            beta_slow: 1.0,
            original_context: 4096,
            truncate: false,
            attention_factor: 0.1 * 32f64.ln() + 1.0,
        };
        let kind = |layer| if layer % 2 == 0 { LayerKind::Sliding } else { LayerKind::Full };
        ModelConfig {
            hidden: 2880,
            intermediate: 2880,
            layers: (0..layers).map(kind).collect(),
            heads: 64,
            kv_heads: 8,
            head_dim: 64,
            experts,
            top_k: 4,
            window: 128,
            vocab: 201_088,
            eps: 1e-5,
            swiglu_limit: 7.0,
            rope,
            context: 131_072,
            eos: vec![200_002],
        }
    }

    fn big() -> ModelConfig {
        gpt_oss(36, 128)
    }

    fn small() -> ModelConfig {
        gpt_oss(24, 32)
    }

    fn cost(model: &ModelConfig, ep: u32, hardware: Hardware) -> Cost {
        Cost::new(model, Layout::new(ep, 0).unwrap(), Formats::BF16, hardware)
    }

    /// `batch` sequences a rank, each with one row after `context` positions.
    fn decode(ranks: usize, batch: u32, context: u32) -> StepShape {
        let mut rank = RankShape::default();
        (0..batch).for_each(|_| rank.add_run(context, 1, 1, 128));
        StepShape(vec![rank; ranks])
    }

    /// One sequence that reads `rows` tokens from the first on.
    fn prefill(rows: u32) -> StepShape {
        let mut rank = RankShape::default();
        rank.add_run(0, rows, 0, 128);
        StepShape(vec![rank])
    }

    #[track_caller]
    fn near(found: f64, expected: f64, share: f64, what: &str) {
        assert!((found / expected - 1.0).abs() <= share, "{what}: {found} is not within {share} of {expected}");
    }

    #[test]
    fn decode_meets_the_roofline() {
        // Milliseconds a step at 1k context, from bytes counted by hand.
        let table = [
            ("120b H100", big(), Hardware::H100, [1.68, 5.71, 14.5, 19.6, 22.8, 25.0]),
            ("120b H200", big(), Hardware::H200, [1.17, 3.98, 10.1, 13.7, 15.9, 17.7]),
            ("20b H100", small(), Hardware::H100, [1.25, 3.11, 4.46, 4.80, 5.41, 6.62]),
        ];
        for (name, model, hardware, milliseconds) in table {
            let cost = cost(&model, 1, hardware);
            for (batch, expected) in [1, 8, 32, 64, 128, 256].into_iter().zip(milliseconds) {
                let found = cost.step_seconds(&decode(1, batch, 1023)) * 1e3;
                near(found, expected, 0.1, &format!("{name} B={batch}"));
            }
        }
    }

    #[test]
    fn prefill_is_bound_by_operations() {
        for (model, per_second) in [(big(), 86e3), (small(), 129e3)] {
            // Without attention over long contexts, which the figure leaves out.
            let rows = 16 * 512;
            let mut rank = RankShape::default();
            (0..16).for_each(|_| rank.add_run(0, 512, 0, 128));
            let seconds = cost(&model, 1, Hardware::H100).step_seconds(&StepShape(vec![rank]));
            near(f64::from(rows) / seconds, per_second, 0.1, "tokens a second");
        }
        let cpu = Cost::new(&small(), Layout::new(1, 0).unwrap(), Formats::Q8, Hardware::CPU_2_CORES);
        near(512.0 / cpu.step_seconds(&prefill(512)), 155.0, 0.1, "tokens a second");
    }

    #[test]
    fn decode_on_two_cores_reads_dense_weights_by_their_format() {
        for (formats, range) in [(Formats::Q8, 14.0..23.0), (Formats::BF16, 12.0..16.0)] {
            let cost = Cost::new(&small(), Layout::new(1, 0).unwrap(), formats, Hardware::CPU_2_CORES);
            let per_second = 1.0 / cost.step_seconds(&decode(1, 1, 127));
            assert!(range.contains(&per_second), "{per_second} tokens a second with {formats:?}");
        }
    }

    #[test]
    fn rows_visit_as_many_ranks_and_experts_as_expected() {
        for (ep, copies) in [(1, 0.0), (2, 0.94), (4, 2.07), (8, 2.93)] {
            let found = cost(&big(), ep, Hardware::H100).copies();
            assert!((found - copies).abs() < 0.01, "{ep} ranks: {found} copies");
        }
        for (model, experts) in [(big(), [4.0, 28.7, 81.7, 111.0, 126.0]), (small(), [4.0, 21.0, 31.6, 32.0, 32.0])] {
            for (rows, expected) in [1, 8, 32, 64, 128].into_iter().zip(experts) {
                near(cost(&model, 1, Hardware::H100).distinct_experts(rows), expected, 0.01, "experts");
            }
        }
    }

    #[test]
    fn on_a_fast_link_latency_decides() {
        let model = big();
        let step = |hardware: Hardware| {
            let phases = cost(&model, 8, hardware).phases(&decode(8, 64, 1023));
            phases[0][Phase::Dispatch as usize]
        };
        // 64 rows a rank, 2.93 copies, 2880 numbers of 2 bytes: 1.08 MB a layer.
        let bytes = step(Hardware { link_latency: 0.0, ..Hardware::H100 }) / 36.0;
        near(bytes, 2.4e-6, 0.05, "seconds of a layer on NVLink");
        let slow = step(Hardware { link_latency: 0.0, link_bandwidth: 50e9, ..Hardware::H100 }) / 36.0;
        near(slow, 22e-6, 0.05, "seconds of a layer at 400 Gb/s");
        assert!(step(Hardware::H100) > 4.0 * bytes * 36.0);
    }

    #[test]
    fn a_step_takes_as_long_as_its_slowest_rank_and_the_others_wait_in_the_exchange() {
        let cost = cost(&big(), 2, Hardware::H100);
        let mut shape = decode(2, 8, 1023);
        (0..56).for_each(|_| shape.0[1].add_run(100_000, 1, 1, 128));
        let phases = cost.phases(&shape);
        let sums = phases.iter().map(|phases| phases.iter().sum::<f64>()).collect::<Vec<_>>();
        near(sums[0], sums[1], 0.001, "both ranks are busy or wait to the end");
        assert!(phases[0][Phase::Dispatch as usize] > 5.0 * phases[1][Phase::Dispatch as usize]);
        assert!(cost.step_seconds(&shape) >= sums[0]);
        // A rank without rows takes part, too.
        shape.0[0] = RankShape::default();
        assert!(cost.step_seconds(&shape) > cost.step_seconds(&decode(2, 8, 1023)));
    }

    #[test]
    fn a_run_reads_what_its_rows_see() {
        for (start, rows, window) in [(0, 1, 4), (0, 9, 4), (2, 5, 4), (3, 1, 4), (4, 3, 4), (100, 7, 4), (5, 3, 1000)]
        {
            let mut shape = RankShape::default();
            shape.add_run(start, rows, 1, window);
            let (end, first) = (u64::from(start + rows), u64::from((start + 1).saturating_sub(window)));
            assert_eq!(shape.full.positions, end);
            assert_eq!(shape.sliding.positions, end - first, "{start} {rows} {window}");
            let seen = |p: u32| u64::from(p + 1);
            assert_eq!(shape.full.pairs, (start..start + rows).map(seen).sum::<u64>());
            let windowed = |p: u32| seen(p).min(u64::from(window));
            assert_eq!(
                shape.sliding.pairs,
                (start..start + rows).map(windowed).sum::<u64>(),
                "{start} {rows} {window}"
            );
        }
    }

    fn calibrated() -> (Calibrated, StepShape) {
        let rule = DeadlineRule { factor: 10.0, min_ms: 20, max_ms: 5000 };
        (Calibrated::new(cost(&big(), 2, Hardware::H100), rule), decode(2, 8, 1023))
    }

    /// Takes `steps` steps in from a machine that takes `times` as long as predicted.
    fn observe(calibrated: &mut Calibrated, shape: &StepShape, steps: usize, times: f64) {
        let predicted = calibrated.cost().phases(shape)[0];
        let mut measured = PhaseTimes::default();
        for (phase, seconds) in Phase::ALL.into_iter().zip(predicted) {
            measured.add(phase, (seconds * times * 1e6).round() as u64);
        }
        (0..steps).for_each(|_| calibrated.observe(&predicted, &measured));
    }

    #[test]
    fn deadlines_follow_what_is_measured() {
        let (mut calibrated, shape) = calibrated();
        let floor = calibrated.cost().step_seconds(&shape);
        assert_eq!(calibrated.deadline(&shape), (floor * 1e4).ceil() as u32);
        for times in [3.0, 7.0] {
            observe(&mut calibrated, &shape, 1000, times);
            near(calibrated.step_seconds(&shape), floor * times, 0.05, "seconds of a step");
        }
        // One slow step among many changes little.
        let before = calibrated.deadline(&shape);
        observe(&mut calibrated, &shape, 1, 14.0);
        near(f64::from(calibrated.deadline(&shape)), f64::from(before), 0.05, "milliseconds");
    }

    #[test]
    fn a_deadline_stays_within_its_bounds_whatever_is_measured() {
        let (mut calibrated, shape) = calibrated();
        observe(&mut calibrated, &shape, 1000, 0.0);
        assert_eq!(calibrated.deadline(&shape), 20);
        observe(&mut calibrated, &shape, 1000, f64::MAX);
        assert_eq!(calibrated.deadline(&shape), 5000);
        assert!(Phase::ALL.into_iter().all(|phase| Calibrated::RATIOS.contains(&calibrated.ratio(phase))));
        // A step without rows is bounded, too.
        assert!((20..=5000).contains(&calibrated.deadline(&StepShape::default())));
    }
}
