//! A worker as a process among others: whose child it is, and with whom it shares memory.

use std::io::Read;
use std::os::unix::fs::MetadataExt;

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

/// Names the memory that this process may use: the same for all processes of a machine's control group. Empty where
/// the system does not say.
#[must_use]
pub fn memory_pool() -> String {
    let Ok(boot) = std::fs::read_to_string("/proc/sys/kernel/random/boot_id") else { return String::new() };
    let groups = std::fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let path = groups.lines().find_map(|line| line.strip_prefix("0::/"));
    // A container sees its own group as the root; the inode is the machine's number of the group.
    let group = path.and_then(|path| std::fs::metadata(format!("/sys/fs/cgroup/{path}")).ok());
    format!("{}/{}", boot.trim(), group.map_or(0, |group| group.ino()))
}
