//! On which rank a sequence lives.

/// What a rank carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Sequences that live there.
    pub seqs: u32,
    /// Tokens still to be prefilled there.
    pub prefill: u32,
    /// Whether the sequence fits.
    pub fits: bool,
}

/// The rank with the fewest sequences among those where the new one fits; then the least prefill; then the lowest.
#[must_use]
pub fn choose(loads: &[Load]) -> Option<usize> {
    (0..loads.len()).filter(|&r| loads[r].fits).min_by_key(|&r| (loads[r].seqs, loads[r].prefill, r))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emptiest_rank_that_fits_is_chosen() {
        let load = |seqs, prefill, fits| Load { seqs, prefill, fits };
        assert_eq!(choose(&[load(2, 0, true), load(1, 9, true), load(1, 3, true), load(0, 0, false)]), Some(2));
        assert_eq!(choose(&[load(0, 0, false)]), None);
        assert_eq!(choose(&[]), None);
    }
}
