//! HTTP itself: paths, methods, sizes, slowness.

use std::time::Duration;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::support::{Play, Server, config, harmony, post_bytes, question, start, start_writing, writing};

async fn server() -> Server {
    start_writing("<|channel|>final<|message|>7<|return|>").await
}

fn chat(headers: &str, body: &[u8]) -> Vec<u8> {
    let head = format!("POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\nconnection: close\r\n{headers}\r\n");
    [head.as_bytes(), body].concat()
}

async fn still_serves(server: &Server) {
    assert_eq!(server.ask(json!({})).await.status, 200);
}

#[tokio::test]
async fn unknown_paths_and_methods() {
    let server = server().await;
    for path in ["/", "/v1", "/v1/", "/v1/chat/completions/", "/chat/completions", "//v1/models", "/v1/../metrics"] {
        let reply = server.get(path).await;
        assert_eq!((reply.status, &reply.error()["code"]), (404, &json!("unknown_url")), "{path}");
        assert!(reply.text().contains("POST /v1/chat/completions"), "{}", reply.text());
    }
    for request in ["GET /v1/chat/completions", "DELETE /v1/models", "POST /health", "OPTIONS /v1/chat/completions"] {
        let head = format!("{request} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
        let reply = server.send(head.as_bytes()).await;
        assert_eq!((reply.status, &reply.error()["code"]), (405, &json!("method_not_allowed")), "{request}");
        assert!(reply.header("allow").is_some(), "{request}");
    }
}

#[tokio::test]
async fn a_large_body_is_refused_before_it_is_read() {
    let mut config = config();
    config.limits.body_wait = Duration::from_millis(50);
    let plays = writing("<|channel|>final<|message|>7<|return|>");
    let server = start(config, move |_| Ok(plays.clone())).await;
    let json = "content-type: application/json\r\n";
    for length in ["4194305", "4294967296", "1152921504606846976"] {
        let reply = server.send(&chat(&format!("{json}content-length: {length}\r\n"), b"")).await;
        assert_eq!((reply.status, &reply.error()["code"]), (413, &json!("request_too_large")));
    }
    let head = chat(&format!("{json}transfer-encoding: chunked\r\n"), b"");
    let mut stream = server.connect(&head).await;
    let chunk = [format!("{:x}\r\n", 1 << 20).into_bytes(), vec![b' '; 1 << 20], b"\r\n".to_vec()].concat();
    let (mut read, mut write) = stream.split();
    let send = async {
        for _ in 0..6 {
            write.write_all(&chunk).await.ok();
        }
    };
    let mut answer = vec![0; 12];
    let (_, received) = tokio::join!(send, read.read_exact(&mut answer));
    received.unwrap();
    assert_eq!(answer, b"HTTP/1.1 413");
    still_serves(&server).await;
}

#[tokio::test]
async fn who_sends_everything_before_reading_learns_that_it_is_too_large() {
    let server = server().await;
    let next = "GET /livez HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n";
    let body = vec![b' '; 16 << 20];
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\n";
    let sized = [format!("{head}content-length: {}\r\n\r\n", body.len()).as_bytes(), &body].concat();
    let chunk = format!("{:x}\r\n", body.len());
    let chunked =
        [format!("{head}transfer-encoding: chunked\r\n\r\n{chunk}").as_bytes(), &body, b"\r\n0\r\n\r\n"].concat();
    for request in [sized, chunked] {
        let mut stream = server.connect(b"").await;
        stream.write_all(&request).await.unwrap();
        stream.write_all(next.as_bytes()).await.unwrap();
        let mut answers = String::new();
        stream.read_to_string(&mut answers).await.unwrap();
        assert!(answers.starts_with("HTTP/1.1 413"), "{answers}");
        assert!(answers.contains("HTTP/1.1 200"), "the connection goes on: {answers}");
    }
}

#[tokio::test]
async fn who_reads_nothing_loses_the_connection() {
    let mut config = config();
    config.limits.write_wait = Duration::from_millis(100);
    // More than the system keeps for a reader.
    let piece = Play::Tokens(harmony(&"=".repeat(64)).repeat(1 << 14));
    let plays =
        [vec![Play::Tokens(harmony("<|channel|>final<|message|>"))], vec![piece; 32], vec![Play::UntilCancelled]];
    let mut server = start(config, move |_| Ok(plays.concat())).await;
    let asked = question(json!({"stream": true})).to_string();
    let _stream = server.connect(&post_bytes(asked.as_bytes())).await;
    server.cancelled.recv().await.unwrap();
}

#[tokio::test]
async fn only_plain_json_is_read() {
    let server = server().await;
    let body = question(json!({})).to_string();
    let length = format!("content-length: {}\r\n", body.len());
    for headers in [
        "",
        "content-type: text/plain\r\n",
        "content-type: application/x-www-form-urlencoded\r\n",
        "content-type: application/json\r\ncontent-encoding: gzip\r\n",
        "content-type: \u{ff}\r\n",
    ] {
        let reply = server.send(&chat(&format!("{headers}{length}"), body.as_bytes())).await;
        assert_eq!((reply.status, &reply.error()["code"]), (415, &json!("unsupported_media_type")), "{headers}");
    }
    let headers = format!("content-type: application/json; charset=utf-8\r\ncontent-encoding: identity\r\n{length}");
    assert_eq!(server.send(&chat(&headers, body.as_bytes())).await.status, 200);
}

#[tokio::test]
async fn heads_are_bounded() {
    let server = server().await;
    let large = format!("x-large: {}\r\n", "a".repeat(300_000));
    let many = (0..10_000).map(|at| format!("x-{at}: a\r\n")).collect::<String>();
    for headers in [large, many] {
        let reply = server.send(&chat(&headers, b"")).await;
        assert!(matches!(reply.status, 0 | 431), "{}", reply.head);
        still_serves(&server).await;
    }
}

#[tokio::test]
async fn garbage_is_no_request() {
    let server = server().await;
    for bytes in
        [&b"\x16\x03\x01\x02\x00\x01\x00"[..], b"GET\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\0\0\r\n\r\n"]
    {
        let mut stream = server.connect(bytes).await;
        stream.shutdown().await.ok();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok();
        assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
    }
    still_serves(&server).await;
}

#[tokio::test]
async fn slow_heads_and_bodies_are_cut_off() {
    let mut config = config();
    config.limits.header_wait = Duration::from_millis(50);
    config.limits.body_wait = Duration::from_millis(50);
    let server = start(config, |request| panic!("{request:?} reached the engine")).await;
    let mut slow = Vec::new();
    for _ in 0..50 {
        slow.push(server.connect(b"POST /v1/chat/completions HTTP/1.1\r\nhost:").await);
    }
    assert_eq!(server.get("/livez").await.status, 200);
    for mut stream in slow {
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).await.ok();
        assert!(!answer.starts_with(b"HTTP/1.1 2"));
    }
    let reply = server.send(&chat("content-type: application/json\r\ncontent-length: 100\r\n", b"{\"model\":")).await;
    assert_eq!((reply.status, &reply.error()["code"]), (408, &json!("request_timeout")));
}

#[tokio::test]
async fn a_body_that_breaks_off_harms_nobody() {
    let server = server().await;
    let mut stream = server.connect(&chat("content-type: application/json\r\ncontent-length: 100\r\n", b"{")).await;
    stream.shutdown().await.unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok();
    assert!(!answer.starts_with(b"HTTP/1.1 2"), "{}", String::from_utf8_lossy(&answer));
    still_serves(&server).await;
}

#[tokio::test]
async fn request_ids_are_given_back_or_made() {
    let server = server().await;
    let with =
        |id: &str| format!("GET /v1/models HTTP/1.1\r\nhost: t\r\nconnection: close\r\nx-request-id: {id}\r\n\r\n");
    assert_eq!(server.send(with("abc-1").as_bytes()).await.header("x-request-id"), Some("abc-1"));
    for made in [server.get("/v1/models").await, server.send(with(&"x".repeat(500)).as_bytes()).await] {
        assert!(made.header("x-request-id").unwrap().starts_with("req_"), "{}", made.head);
    }
}

#[tokio::test]
async fn a_connection_serves_one_request_after_another() {
    let server = server().await;
    let first = "GET /livez HTTP/1.1\r\nhost: t\r\n\r\n";
    let last = "GET /livez HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n";
    assert_eq!(answers(&server, &format!("{first}{last}")).await, 2);
}

#[tokio::test]
async fn two_lengths_are_never_two_requests() {
    let server = server().await;
    let hidden = "GET /livez HTTP/1.1\r\nhost: t\r\nconnection: close\r\n\r\n";
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: t\r\ncontent-type: application/json\r\n";
    let both = format!("{head}content-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n{hidden}");
    assert!(answers(&server, &both).await <= 1);
    let twice = format!("{head}content-length: 2\r\ncontent-length: 3\r\n\r\n{{}}{hidden}");
    assert!(answers(&server, &twice).await <= 1);
}

/// How many answers `requests` get until the server closes.
async fn answers(server: &Server, requests: &str) -> usize {
    let mut stream = server.connect(requests.as_bytes()).await;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).await.ok();
    String::from_utf8_lossy(&answer).matches("HTTP/1.1 ").count()
}
