//! How long a worker belongs to a coordinator, for whatever waits on that one's behalf.

use std::time::{Duration, Instant};

use tokio::sync::watch;

/// How long a wait goes on before it looks again whether anybody still wants its end.
const LOOK: Duration = Duration::from_millis(50);

/// The time that a worker belongs to one coordinator. Over once it is released, taken over or given up: whatever waits for
/// other ranks then ends, and with it the epoch. The default lasts for ever.
#[derive(Clone, Debug, Default)]
pub struct Tenure(Option<watch::Receiver<()>>);

/// What a [`Tenure`] lasts as long as.
#[derive(Debug)]
pub struct Hold(#[expect(dead_code, reason = "its end is what counts")] watch::Sender<()>);

impl Tenure {
    /// A tenure that is over when its hold is dropped.
    #[must_use]
    pub fn begin() -> (Hold, Self) {
        let (hold, held) = watch::channel(());
        (Hold(hold), Self(Some(held)))
    }

    /// Whether it is over.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.0.as_ref().is_some_and(|held| held.has_changed().is_err())
    }

    /// Completes when it is over.
    pub async fn over(&mut self) {
        let Some(held) = &mut self.0 else { return std::future::pending().await };
        while held.changed().await.is_ok() {}
    }

    /// When a wait until `until` is to look whether it is over.
    pub(crate) fn next_look(&self, until: Instant) -> Instant {
        if self.0.is_some() { until.min(Instant::now() + LOOK) } else { until }
    }
}
