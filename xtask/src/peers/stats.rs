//! Medians, spreads, and ratios taken round by round.

/// What became of one figure over the rounds.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) least: f64,
    pub(crate) most: f64,
}

impl Summary {
    /// `None` without a single value.
    pub(crate) fn of(values: &[f64]) -> Option<Summary> {
        let mut sorted = values.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (least, most) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let median =
            if sorted.len() % 2 == 1 { sorted[middle] } else { f64::midpoint(sorted[middle - 1], sorted[middle]) };
        Some(Summary { median, least, most })
    }
}

/// `ours[i] / theirs[i]` for every round that has both. Two runs of one round saw the machine in the same mood, so
/// their ratio says more than the ratio of two medians.
pub(crate) fn ratios(ours: &[Option<f64>], theirs: &[Option<f64>]) -> Vec<f64> {
    let pairs = ours.iter().zip(theirs);
    pairs.filter_map(|(ours, theirs)| Some((*ours)? / (*theirs)?)).filter(|ratio| ratio.is_finite()).collect()
}

/// Who goes when: everyone once in each round, and nobody always first.
pub(crate) fn rotated<T: Copy>(all: &[T], round: usize) -> Vec<T> {
    let mut order = all.to_vec();
    if !order.is_empty() {
        order.rotate_left(round % all.len());
    }
    order
}

/// Kullback-Leibler divergence of softmax(`logits`) from softmax(`reference`), in nats, and whether both prefer the
/// same token.
pub(crate) fn divergence(reference: &[f32], logits: &[f32]) -> (f64, bool) {
    let (p, q) = (log_softmax(reference), log_softmax(logits));
    let sum: f64 = p.iter().zip(&q).map(|(p, q)| p.exp() * (p - q)).sum();
    // Rounding may leave a little less than nothing; what is no number stays none.
    (if sum < 0.0 { 0.0 } else { sum }, best(reference) == best(logits))
}

fn log_softmax(logits: &[f32]) -> Vec<f64> {
    let most = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let shifted: Vec<f64> = logits.iter().map(|logit| f64::from(*logit) - f64::from(most)).collect();
    let log_sum = shifted.iter().map(|logit| logit.exp()).sum::<f64>().ln();
    shifted.into_iter().map(|logit| logit - log_sum).collect()
}

/// The first of the largest.
fn best(logits: &[f32]) -> Option<usize> {
    (0..logits.len()).rev().max_by(|a, b| logits[*a].total_cmp(&logits[*b]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_or_between_the_two_middles() {
        let odd = Summary { median: 2.0, least: 1.0, most: 9.0 };
        assert_eq!(Summary::of(&[9.0, 1.0, 2.0]), Some(odd));
        assert_eq!(Summary::of(&[4.0, 1.0, 2.0, 9.0]).map(|s| s.median), Some(3.0));
        assert_eq!(Summary::of(&[]), None);
    }

    #[test]
    fn ratios_pair_the_same_round_and_skip_what_lacks() {
        let (ours, theirs) = ([Some(3.0), None, Some(8.0), Some(1.0)], [Some(2.0), Some(1.0), Some(2.0), Some(0.0)]);
        assert_eq!(ratios(&ours, &theirs), [1.5, 4.0]);
        // A machine that slows down by half between rounds changes both medians and no ratio.
        let slower = |values: [f64; 3]| values.map(Some);
        let all = ratios(&slower([30.0, 15.0, 15.0]), &slower([20.0, 10.0, 10.0]));
        assert_eq!(Summary::of(&all).map(|s| (s.least, s.median, s.most)), Some((1.5, 1.5, 1.5)));
    }

    #[test]
    fn everyone_goes_first_in_turn() {
        let orders: Vec<Vec<char>> = (0..4).map(|round| rotated(&['a', 'b', 'c'], round)).collect();
        assert_eq!(orders, [['a', 'b', 'c'], ['b', 'c', 'a'], ['c', 'a', 'b'], ['a', 'b', 'c']]);
        assert_eq!(rotated::<char>(&[], 3), []);
    }

    #[test]
    fn divergence_is_that_of_the_distributions() {
        // softmax(ln 3, 0) = (3/4, 1/4), softmax(0, 0) = (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2.
        let (kl, same) = divergence(&[3f32.ln(), 0.0], &[0.0, 0.0]);
        assert!((kl - (0.75 * 1.5f64.ln() + 0.25 * 0.5f64.ln())).abs() < 1e-7, "{kl}");
        assert!(same, "a tie goes to the first");
        // A constant added to all logits changes nothing, however large.
        let (kl, same) = divergence(&[1.0, 2.0, 3.0], &[1001.0, 1002.0, 1003.0]);
        assert!(kl < 1e-12 && same);
        assert!(!divergence(&[1.0, 2.0], &[2.0, 1.0]).1);
    }
}
