//! Connections between a coordinator and its workers that break while answers are streamed: nobody notices.

#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "support/server.rs"]
#[allow(dead_code, reason = "other test binaries use the rest")]
mod server;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use phalanx_coordinator::workers::PLANS_AHEAD_MAX;
use phalanx_worker::runner::STEPS_IN_FLIGHT;
use serde_json::{Value, json};
use server::Serve;

/// A worker keeps a result of every plan that a coordinator may send again.
const _: () = assert!(PLANS_AHEAD_MAX <= STEPS_IN_FLIGHT);

fn phalanx(args: &[&str]) -> (Child, String) {
    let mut child = Command::new(server::paths::binary()).args(args).stdout(Stdio::piped()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    (child, line)
}

/// A worker process of its own; it ends with this.
struct Worker(Child, SocketAddr);

impl Worker {
    fn start() -> Self {
        let (child, line) = phalanx(&["worker", "--threads", "1"]);
        let address = line.split(" on ").nth(1).and_then(|rest| rest.split(';').next()).unwrap().parse().unwrap();
        Self(child, address)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// Passes bytes on; once it is armed, each connection is cut after some of them.
struct Proxy {
    address: SocketAddr,
    armed: Arc<AtomicBool>,
    cuts: Arc<AtomicUsize>,
}

impl Proxy {
    fn start(to: SocketAddr, seed: usize) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Self { address: listener.local_addr().unwrap(), armed: Arc::default(), cuts: Arc::default() };
        let (armed, cuts) = (Arc::clone(&proxy.armed), Arc::clone(&proxy.cuts));
        std::thread::spawn(move || {
            for (nth, here) in listener.incoming().map_while(Result::ok).enumerate() {
                let Ok(there) = TcpStream::connect(to) else { continue };
                // Between one and two thousand bytes, in an order that looks like none.
                let left = Arc::new(AtomicUsize::new(1000 + (seed + nth) * 7919 % 1000));
                for (from, to) in [(&here, &there), (&there, &here)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let (armed, cuts, left) = (Arc::clone(&armed), Arc::clone(&cuts), Arc::clone(&left));
                    std::thread::spawn(move || pass(from, to, &armed, &cuts, &left));
                }
            }
        });
        proxy
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, armed: &AtomicBool, cuts: &AtomicUsize, left: &AtomicUsize) {
    let mut bytes = [0; 1024];
    while let Ok(count @ 1..) = from.read(&mut bytes) {
        if armed.load(Ordering::SeqCst) {
            let before = left.load(Ordering::SeqCst);
            left.store(before.saturating_sub(count), Ordering::SeqCst);
            if before < count {
                cuts.fetch_add(1, Ordering::SeqCst);
                drop(to.write_all(&bytes[..before]));
                break;
            }
        }
        if to.write_all(&bytes[..count]).is_err() {
            break;
        }
    }
    drop(from.shutdown(Shutdown::Both));
    drop(to.shutdown(Shutdown::Both));
}

fn body(index: u32) -> Value {
    json!({
        "model": "gpt-oss-nano",
        "messages": [{"role": "user", "content": format!("What is {} + {}?", 10 + index, 3 * index)}],
        "temperature": if index.is_multiple_of(2) { 0.0 } else { 1.0 },
        "seed": index,
        "max_completion_tokens": 120,
    })
}

/// The answers to several questions asked at once.
fn answers(serve: &Serve) -> Vec<Value> {
    std::thread::scope(|scope| {
        let asked: Vec<_> =
            (0..8).map(|index| scope.spawn(move || serve.post("/v1/chat/completions", &body(index)))).collect();
        let message = |(status, answer): (u16, Value)| {
            assert_eq!(status, 200, "{answer}");
            answer["choices"][0].clone()
        };
        asked.into_iter().map(|asked| message(asked.join().unwrap())).collect()
    })
}

#[test]
fn connections_that_break_change_no_answer() {
    let expected = answers(&Serve::start(&["--workers", "2"]));
    let workers = [Worker::start(), Worker::start()];
    let proxies = [Proxy::start(workers[0].1, 1), Proxy::start(workers[1].1, 5)];
    let [one, two] = [&proxies[0], &proxies[1]].map(|proxy| proxy.address.to_string());
    let (child, line) = phalanx(&["coordinator", "--listen", "127.0.0.1:0", "--worker", &one, "--worker", &two]);
    let url = line.split(" on ").nth(1).and_then(|rest| rest.split("/v1").next());
    let url = url.unwrap_or_else(|| panic!("the coordinator announced {line:?}")).to_owned();
    let serve = Serve { child, url };
    proxies.iter().for_each(|proxy| proxy.armed.store(true, Ordering::SeqCst));
    assert_eq!(answers(&serve), expected);
    for proxy in &proxies {
        let cuts = proxy.cuts.load(Ordering::SeqCst);
        assert!(cuts > 2, "only {cuts} connections were cut");
    }
}
