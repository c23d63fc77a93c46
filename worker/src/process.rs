//! A worker as a child of another process.

use std::io::Read;

/// Completes when standard input ends. A parent holds the other end of a pipe; when it dies, however it dies, the
/// pipe closes, and a worker that shuts down then never outlives it.
///
/// # Errors
/// The thread that reads cannot be started.
pub fn parent_gone() -> std::io::Result<impl Future<Output = ()> + Send + 'static> {
    let (gone, noticed) = tokio::sync::oneshot::channel::<()>();
    // Not the runtime's own standard input: its pending read would keep the runtime from ending.
    std::thread::Builder::new().name("parent".to_owned()).spawn(move || {
        let mut ignored = [0; 256];
        while std::io::stdin().read(&mut ignored).is_ok_and(|read| read > 0) {}
        drop(gone);
    })?;
    Ok(async move { drop(noticed.await) })
}
