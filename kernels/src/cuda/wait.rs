//! Waiting for a device, never without a deadline: a device that hangs is an error like any other.

use std::sync::mpsc;
use std::time::{Duration, Instant};

use crate::KernelError;

/// How long the host waits for a device outside of steps.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// Looks without a pause: a look costs about as much as a short kernel.
const SPINS: u32 = 1000;
/// For how long looks follow each other, with nothing in between but other threads.
const EAGER: Duration = Duration::from_secs(1);
/// Between later looks.
const PAUSE: Duration = Duration::from_micros(100);

/// Waits until `is_done`, no longer than until `deadline`; looks once if it has passed.
///
/// # Errors
/// [`KernelError::Late`], and what `is_done` fails with.
pub(super) fn until(
    what: &'static str,
    deadline: Instant,
    mut is_done: impl FnMut() -> Result<bool, KernelError>,
) -> Result<(), KernelError> {
    let begun = Instant::now();
    for look in 0_u64.. {
        if is_done()? {
            break;
        }
        let now = Instant::now();
        if now >= deadline {
            return Err(KernelError::Late { what });
        }
        match now - begun {
            _ if look < u64::from(SPINS) => std::hint::spin_loop(),
            waited if waited < EAGER => std::thread::yield_now(),
            _ => std::thread::sleep(PAUSE),
        }
    }
    Ok(())
}

/// What a call gives that may hang itself, if it ends in time; it is left behind otherwise.
///
/// # Errors
/// [`KernelError::Late`], also without a thread to call it from.
pub(super) fn within<T: Send + 'static>(
    what: &'static str,
    patience: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, KernelError> {
    let (done, ended) = mpsc::channel();
    // Nobody listens any more once it is late.
    let body = move || drop(done.send(call()));
    let called = std::thread::Builder::new().name(what.to_owned()).spawn(body);
    called.ok().and_then(|_| ended.recv_timeout(patience).ok()).ok_or(KernelError::Late { what })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_hangs_is_left_behind() {
        assert_eq!(within("open", PATIENCE, || 7), Ok(7));
        let (_forever, never) = mpsc::channel::<()>();
        let hangs = within("open", Duration::from_millis(5), move || never.recv().is_ok());
        assert_eq!(hangs, Err(KernelError::Late { what: "open" }));
    }

    #[test]
    fn what_is_done_is_never_late_and_what_hangs_always_is() {
        let past = Instant::now();
        assert_eq!(until("finish", past, || Ok(true)), Ok(()));
        assert_eq!(until("finish", past, || Ok(false)), Err(KernelError::Late { what: "finish" }));
        assert_eq!(
            until("finish", past + Duration::from_millis(5), || Ok(false)),
            Err(KernelError::Late { what: "finish" })
        );
        let broken = KernelError::Device { what: "finish", why: String::new() };
        assert_eq!(until("finish", past + PATIENCE, || Err(broken.clone())), Err(broken));
        let mut looks = 0;
        let third = until("finish", past + PATIENCE, || {
            looks += 1;
            Ok(looks == 3)
        });
        assert_eq!((third, looks), (Ok(()), 3));
    }
}
