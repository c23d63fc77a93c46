//! When the engine cannot, and when the client leaves.

use std::sync::Arc;

use phalanx_coordinator::engine_client::{CellState, EngineError, FinishReason, SubmitError};
use phalanx_coordinator::harmony::special;
use phalanx_proto::Rank;
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::support::{Play, config, harmony, joined, post_bytes, question, read_until, start, start_writing};

fn lost() -> EngineError {
    EngineError::WorkerLost {
        rank: Rank(1),
        address: "10.0.0.7:7000".to_owned(),
        reason: "connection reset".to_owned(),
    }
}

#[tokio::test]
async fn a_stream_whose_worker_dies_ends_with_an_error_event() {
    let server =
        start(config(), |_| Ok(vec![Play::Tokens(harmony("<|channel|>final<|message|>3 + 4")), Play::Fail(lost())]))
            .await;
    let reply = server.ask(json!({"stream": true})).await;
    assert_eq!(reply.status, 200);
    let mut events: Vec<Value> = reply.events().iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    let last = events.pop().unwrap();
    assert_eq!(joined(&events, 0, "content"), "3 + 4");
    assert_eq!((&last["error"]["type"], &last["error"]["code"]), (&json!("server_error"), &json!("worker_lost")));
    let message = last["error"]["message"].as_str().unwrap();
    assert_eq!(message, "worker 1 at 10.0.0.7:7000 was lost: connection reset");
    let metrics = server.get("/metrics").await.text();
    assert!(metrics.contains("finished_reason=\"error\",model_name=\"gpt-oss-test\"} 1"), "{metrics}");
}

#[tokio::test]
async fn an_answer_whose_worker_dies_is_503_and_names_it() {
    let server = start(config(), |_| Ok(vec![Play::Tokens(harmony("<|channel|>final")), Play::Fail(lost())])).await;
    let reply = server.ask(json!({})).await;
    let error = reply.error();
    assert_eq!((reply.status, &error["code"]), (503, &json!("worker_lost")));
    assert!(error["message"].as_str().unwrap().contains("worker 1"), "{error}");
}

#[tokio::test]
async fn one_choice_that_fails_ends_the_whole_answer() {
    let mut server = start(config(), |request| match request.sampling.choice {
        0 => Ok(vec![Play::UntilCancelled]),
        _ => Ok(vec![Play::Fail(lost())]),
    })
    .await;
    assert_eq!(server.ask(json!({"n": 2})).await.status, 503);
    server.cancelled.recv().await.unwrap();
    let reply = server.ask(json!({"n": 2, "stream": true})).await;
    assert!(reply.events().last().unwrap().contains("worker_lost"), "{}", reply.text());
    server.cancelled.recv().await.unwrap();
}

#[tokio::test]
async fn an_engine_that_vanishes_leaves_nobody_waiting() {
    let server = start(config(), |_| Ok(vec![Play::Tokens(harmony("<|channel|>"))])).await;
    let reply = server.ask(json!({})).await;
    assert_eq!((reply.status, &reply.error()["code"]), (503, &json!("engine_failed")));
    let events = server.ask(json!({"stream": true})).await.events();
    assert!(events.last().unwrap().contains("engine_failed"));
}

#[tokio::test]
async fn refusals_of_the_engine_have_their_status() {
    for (refusal, status, code, retry_after) in [
        (SubmitError::QueueFull { retry_after_ms: 2500 }, 429, "rate_limit_exceeded", Some("3")),
        (SubmitError::QueueFull { retry_after_ms: 0 }, 429, "rate_limit_exceeded", Some("1")),
        (SubmitError::ContextLength { prompt: 70, max_tokens: 60, context: 100 }, 400, "context_length_exceeded", None),
        (SubmitError::Draining, 503, "shutting_down", Some("5")),
        (SubmitError::Unavailable { reason: "worker 2 is gone".to_owned() }, 503, "unavailable", Some("5")),
    ] {
        let message = refusal.to_string();
        let server = start(config(), move |_| Err(refusal.clone())).await;
        for stream in [false, true] {
            let reply = server.ask(json!({"stream": stream})).await;
            let error = reply.error();
            assert_eq!((reply.status, &error["code"]), (status, &json!(code)));
            assert_eq!(error["message"], message);
            assert_eq!(reply.header("retry-after"), retry_after);
            assert_eq!(reply.header("retry-after-ms").is_some(), retry_after.is_some());
        }
    }
}

#[tokio::test]
async fn a_refused_choice_takes_the_others_with_it() {
    let mut server = start(config(), |request| match request.sampling.choice {
        0 => Ok(vec![Play::UntilCancelled]),
        _ => Err(SubmitError::QueueFull { retry_after_ms: 1000 }),
    })
    .await;
    assert_eq!(server.ask(json!({"n": 2})).await.status, 429);
    server.cancelled.recv().await.unwrap();
}

#[tokio::test]
async fn a_cell_that_cannot_serve_refuses_at_once() {
    let server = start_writing("<|channel|>final<|message|>7<|return|>").await;
    for (state, words) in [
        (CellState::Loading("worker 1 reads weights".to_owned()), "worker 1 reads weights"),
        (CellState::Failed("worker 2 at 10.0.0.8:7000 was lost".to_owned()), "worker 2 at 10.0.0.8:7000"),
        (CellState::Draining, "shutting down"),
    ] {
        server.status.send_modify(|status| status.state = state);
        let reply = server.ask(json!({})).await;
        assert_eq!(reply.status, 503);
        assert!(reply.error()["message"].as_str().unwrap().contains(words), "{}", reply.text());
    }
}

#[tokio::test]
async fn a_client_that_leaves_a_stream_cancels_it() {
    let mut server =
        start(config(), |_| Ok(vec![Play::Tokens(harmony("<|channel|>final<|message|>first")), Play::UntilCancelled]))
            .await;
    let mut stream =
        server.connect(&post_bytes(question(json!({"stream": true, "n": 2})).to_string().as_bytes())).await;
    read_until(&mut stream, "first").await;
    drop(stream);
    server.cancelled.recv().await.unwrap();
    server.cancelled.recv().await.unwrap();
    let metrics = server.get("/metrics").await.text();
    assert!(metrics.contains("finished_reason=\"abort\",model_name=\"gpt-oss-test\"} 2"), "{metrics}");
}

#[tokio::test]
async fn a_client_that_does_not_await_its_answer_cancels_it() {
    let mut server = start(config(), |_| Ok(vec![Play::UntilCancelled])).await;
    let stream = server.connect(&post_bytes(question(json!({})).to_string().as_bytes())).await;
    server.seen.recv().await.unwrap();
    drop(stream);
    server.cancelled.recv().await.unwrap();
}

#[tokio::test]
async fn a_shutdown_lets_running_requests_finish() {
    let gate = Arc::new(Notify::new());
    let wait = Arc::clone(&gate);
    let mut server = start(config(), move |_| {
        let finish = Play::Finish(FinishReason::Stop(special::RETURN));
        Ok(vec![Play::Tokens(harmony("<|channel|>final<|message|>first")), Play::Wait(Arc::clone(&wait)), finish])
    })
    .await;
    let mut stream = server.connect(&post_bytes(question(json!({"stream": true})).to_string().as_bytes())).await;
    read_until(&mut stream, "first").await;
    server.stop.take().unwrap().send(()).unwrap();
    while tokio::net::TcpStream::connect(server.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    gate.notify_one();
    read_until(&mut stream, "[DONE]").await;
    server.served.await.unwrap();
}

#[tokio::test]
async fn a_server_that_is_dropped_cuts_off_what_is_under_way() {
    let mut server = start(config(), |_| Ok(vec![Play::UntilCancelled])).await;
    let _stream = server.connect(&post_bytes(question(json!({"stream": true})).to_string().as_bytes())).await;
    server.seen.recv().await.unwrap();
    server.served.abort();
    server.cancelled.recv().await.unwrap();
}
