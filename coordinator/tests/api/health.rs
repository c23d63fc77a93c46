//! Probes and metrics.

use std::time::{Duration, Instant};

use phalanx_coordinator::engine_client::{CellState, WorkerState, WorkerStatus};
use phalanx_planner::Stats;
use phalanx_proto::{Epoch, ExchangeCounters, Phase, PhaseTimes, Rank, StepResult};
use serde_json::json;

use phalanx_coordinator::api::{ApiLimits, serve_loading};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use crate::support::{Server, start_writing};

async fn server() -> Server {
    start_writing("<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>7<|return|>")
        .await
}

#[tokio::test]
async fn ready_is_whether_the_cell_can_serve() {
    let server = server().await;
    assert_eq!(server.get("/readyz").await.status, 200);
    let worker = |rank, state| WorkerStatus { rank: Rank(rank), address: "10.0.0.7:7000".to_owned(), state };
    server.status.send_modify(|status| {
        status.epoch = Epoch(3);
        status.workers = vec![worker(0, WorkerState::Ready), worker(1, WorkerState::Ready)];
    });
    let health = server.get("/health").await;
    let workers = json!([{"rank": 0, "state": "ready"}, {"rank": 1, "state": "ready"}]);
    let cell = json!({"status": "ok", "reason": null, "epoch": 3, "workers": workers, "running": 0, "waiting": 0});
    assert_eq!(health.json(), json!({"status": "ok", "model": "gpt-oss-test", "cells": [cell]}));
    for (state, name) in [
        (CellState::Loading("worker 1 has read 40 of 100 MB".to_owned()), "loading"),
        (CellState::Draining, "draining"),
        (CellState::Failed("worker 1 was lost".to_owned()), "failed"),
    ] {
        server.status.send_modify(|status| status.state = state);
        let ready = server.get("/readyz").await;
        assert_eq!((ready.status, &ready.error()["code"]), (503, &json!(name)));
        let health = server.get("/health").await;
        assert_eq!((health.status, &health.json()["status"]), (503, &json!(name)));
        assert_eq!(health.error(), ready.error());
        // Loading and draining end by themselves.
        let lives = if name == "failed" { 503 } else { 200 };
        assert_eq!(server.get("/livez").await.status, lives, "a cell that is {name}");
        let line = format!("phalanx_cell_state{{engine=\"0\",state=\"{name}\"}} 1");
        let text = server.get("/metrics").await.text();
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

#[tokio::test]
async fn alive_is_whether_steps_advance() {
    let server = server().await;
    let long_ago = Instant::now().checked_sub(Duration::from_secs(3600)).unwrap();
    server.status.send_modify(|status| status.progress_at = long_ago);
    assert_eq!(server.get("/livez").await.status, 200, "nothing to do");
    server.status.send_modify(|status| status.waiting = 1);
    let reply = server.get("/livez").await;
    assert_eq!((reply.status, &reply.error()["code"]), (503, &json!("stalled")));
    server.status.send_modify(|status| {
        status.progress_at = Instant::now();
        status.running = 1;
    });
    assert_eq!(server.get("/livez").await.status, 200, "steps advance");
}

#[tokio::test]
async fn every_label_set_exists_from_the_start() {
    let server = server().await;
    let reply = server.get("/metrics").await;
    assert_eq!(reply.header("content-type"), Some("text/plain; version=0.0.4; charset=utf-8"));
    let text = reply.text();
    let labels = "engine=\"0\",model_name=\"gpt-oss-test\"";
    let mut expected = vec![
        format!("vllm:num_requests_running{{{labels}}} 0"),
        format!("vllm:num_requests_waiting{{{labels}}} 0"),
        format!("vllm:kv_cache_usage_perc{{{labels}}} 0"),
        format!("vllm:prompt_tokens_total{{{labels}}} 0"),
        format!("vllm:generation_tokens_total{{{labels}}} 0"),
        format!("vllm:time_to_first_token_seconds_count{{{labels}}} 0"),
        format!("vllm:inter_token_latency_seconds_count{{{labels}}} 0"),
        format!("vllm:e2e_request_latency_seconds_count{{{labels}}} 0"),
        format!("vllm:iteration_tokens_total_count{{{labels}}} 0"),
        format!("vllm:num_preemptions_total{{{labels}}} 0"),
        format!("vllm:prefix_cache_queries_total{{{labels}}} 0"),
        format!("vllm:prefix_cache_hits_total{{{labels}}} 0"),
        format!("vllm:prompt_tokens_cached_total{{{labels}}} 0"),
        format!("vllm:request_queue_time_seconds_count{{{labels}}} 0"),
        format!("vllm:request_prefill_time_seconds_count{{{labels}}} 0"),
        format!("vllm:request_decode_time_seconds_count{{{labels}}} 0"),
        "phalanx_requests_waiting{class=\"interactive\",engine=\"0\"} 0".to_owned(),
        "phalanx_requests_waiting{class=\"batch\",engine=\"0\"} 0".to_owned(),
        "phalanx_steps_total{engine=\"0\"} 0".to_owned(),
        "phalanx_step_imbalance_count{engine=\"0\"} 0".to_owned(),
        "phalanx_exchange_rows_total{engine=\"0\",kind=\"dispatch\"} 0".to_owned(),
        "phalanx_exchange_rows_total{engine=\"0\",kind=\"combine\"} 0".to_owned(),
        "phalanx_exchange_bytes_total{direction=\"sent\",engine=\"0\"} 0".to_owned(),
        "phalanx_exchange_bytes_total{direction=\"received\",engine=\"0\"} 0".to_owned(),
        "phalanx_harmony_repairs_total{kind=\"missing_channel\"} 0".to_owned(),
        "phalanx_cell_epoch{engine=\"0\"} 0".to_owned(),
        "phalanx_http_requests_total{code=\"200\",route=\"/v1/chat/completions\"} 0".to_owned(),
        format!("phalanx_build_info{{version=\"{}\"}} 1", env!("CARGO_PKG_VERSION")),
    ];
    expected.extend(["stop", "length", "abort", "error"].map(|reason| {
        format!("vllm:request_success_total{{engine=\"0\",finished_reason=\"{reason}\",model_name=\"gpt-oss-test\"}} 0")
    }));
    expected.extend(
        Phase::ALL.map(|phase| format!("phalanx_step_seconds_count{{engine=\"0\",phase=\"{}\"}} 0", phase.name())),
    );
    expected.extend(
        CellState::NAMES
            .map(|state| format!("phalanx_cell_state{{engine=\"0\",state=\"{state}\"}} {}", u32::from(state == "ok"))),
    );
    expected.extend(WorkerState::ALL.map(|state| format!("phalanx_cell_workers{{state=\"{}\"}} 0", state.name())));
    for line in expected {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

#[tokio::test]
async fn requests_and_steps_are_counted() {
    let server = server().await;
    let usage = server.ask(json!({})).await.json()["usage"].clone();
    server.get("/nowhere").await;
    server.get("/v1/models/gpt-4o").await;
    server.metrics.cell(0).admitted(12);
    server.metrics.cell(0).step(7);
    server.metrics.cell(0).engine(&Stats { kv_usage: 0.25, ..Stats::default() });
    let mut phases = PhaseTimes::default();
    phases.add(Phase::Experts, 1_500_000);
    let exchange = ExchangeCounters { dispatch_rows: 5, combine_rows: 6, bytes_sent: 70, bytes_received: 80 };
    server.metrics.cell(0).result(&StepResult { phases, exchange, ..StepResult::default() });
    server.status.send_modify(|status| {
        (status.running, status.waiting, status.epoch) = (2, 3, Epoch(4));
        let address = "10.0.0.7:7000".to_owned();
        status.workers = vec![WorkerStatus { rank: Rank(0), address, state: WorkerState::Lost }];
    });
    let text = server.get("/metrics").await.text();
    let labels = "engine=\"0\",model_name=\"gpt-oss-test\"";
    let tokens = usage["completion_tokens"].as_u64().unwrap();
    for line in [
        format!("vllm:num_requests_running{{{labels}}} 2"),
        format!("vllm:num_requests_waiting{{{labels}}} 3"),
        format!("vllm:kv_cache_usage_perc{{{labels}}} 0.25"),
        format!("vllm:prompt_tokens_total{{{labels}}} 12"),
        format!("vllm:generation_tokens_total{{{labels}}} {tokens}"),
        format!("vllm:time_to_first_token_seconds_count{{{labels}}} 1"),
        format!("vllm:inter_token_latency_seconds_count{{{labels}}} {}", tokens - 1),
        format!("vllm:e2e_request_latency_seconds_count{{{labels}}} 1"),
        format!("vllm:iteration_tokens_total_sum{{{labels}}} 7"),
        "vllm:request_success_total{engine=\"0\",finished_reason=\"stop\",model_name=\"gpt-oss-test\"} 1".to_owned(),
        "phalanx_step_seconds_sum{engine=\"0\",phase=\"experts\"} 1.5".to_owned(),
        "phalanx_exchange_rows_total{engine=\"0\",kind=\"dispatch\"} 5".to_owned(),
        "phalanx_exchange_rows_total{engine=\"0\",kind=\"combine\"} 6".to_owned(),
        "phalanx_exchange_bytes_total{direction=\"sent\",engine=\"0\"} 70".to_owned(),
        "phalanx_exchange_bytes_total{direction=\"received\",engine=\"0\"} 80".to_owned(),
        "phalanx_cell_epoch{engine=\"0\"} 4".to_owned(),
        "phalanx_cell_workers{state=\"lost\"} 1".to_owned(),
        "phalanx_http_requests_total{code=\"200\",route=\"/v1/chat/completions\"} 1".to_owned(),
        "phalanx_http_requests_total{code=\"404\",route=\"other\"} 1".to_owned(),
        "phalanx_http_requests_total{code=\"404\",route=\"/v1/models/{id}\"} 1".to_owned(),
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in\n{text}");
    }
}

#[tokio::test]
async fn probes_are_answered_while_the_model_loads() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (progress, waits_for) = watch::channel("waiting for the workers".to_owned());
    let loading = tokio::spawn(serve_loading(listener, waits_for, ApiLimits::default()));
    let ask = async |method: &str, path: &str| {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request =
            format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\ncontent-length: 0\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let lives = ask("GET", "/livez").await;
    assert!(lives.starts_with("HTTP/1.1 200") && lives.contains("x-request-id: req_"), "{lives}");
    let ready = ask("GET", "/readyz").await;
    assert!(ready.starts_with("HTTP/1.1 503") && ready.contains("waiting for the workers"), "{ready}");
    progress.send_replace("7 of 9 MiB are read".to_owned());
    for (method, path) in [("GET", "/health"), ("POST", "/v1/chat/completions"), ("GET", "/nowhere")] {
        let answer = ask(method, path).await;
        assert!(answer.starts_with("HTTP/1.1 503") && answer.contains("7 of 9 MiB"), "{answer}");
        assert!(answer.contains("x-request-id: req_"), "{answer}");
        assert!(answer.contains("retry-after: 5") && answer.contains("\"code\":\"loading\""), "{answer}");
    }
    drop(progress);
    loading.await.unwrap();
    assert!(TcpStream::connect(address).await.is_err(), "it ends when the model is there");
}
