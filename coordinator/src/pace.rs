//! How fast a cell works lately, and when a client that it refused should come again.

use std::time::Duration;

use crate::engine_client::RETRY_AFTER_MS;

/// When a refused client should come again: between these seconds, by how long the queue lasts at the present pace.
const RETRY_AFTER: std::ops::RangeInclusive<f64> = 0.1..=60.0;
/// How much the latest step counts.
const SHARE: f64 = 0.1;

/// Rows a second, lately; unknown before the first step.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Pace(Option<f64>);

impl Pace {
    /// A step of so many rows took so long.
    pub(crate) fn observe(&mut self, rows: usize, took: Duration) {
        let latest = rows as f64 / took.as_secs_f64().max(1e-6);
        let pace = self.0.get_or_insert(latest);
        *pace += SHARE * (latest - *pace);
    }

    /// When half of `load` tokens will be done.
    pub(crate) fn retry_after_ms(self, load: u64) -> u64 {
        let Some(pace) = self.0 else { return RETRY_AFTER_MS };
        let seconds = load as f64 / 2.0 / pace.max(1.0);
        (seconds.clamp(*RETRY_AFTER.start(), *RETRY_AFTER.end()) * 1000.0) as u64
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_step_is_believed_and_later_ones_count_by_and_by() {
        let mut pace = Pace::default();
        assert_eq!(pace.retry_after_ms(1_000_000), RETRY_AFTER_MS, "nothing is known yet");
        pace.observe(100, Duration::from_millis(100));
        assert_eq!(pace.retry_after_ms(4_000), 2_000);
        pace.observe(200, Duration::from_millis(100));
        assert_eq!(pace.retry_after_ms(4_400), 2_000);
        assert_eq!((pace.retry_after_ms(0), pace.retry_after_ms(u64::MAX)), (100, 60_000));
    }
}
