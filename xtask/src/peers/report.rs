//! What was measured: for people as two tables, for machines as JSON.

use std::fmt::Write;

use super::engine::{BATCHED, BUSY, Engine, Load, Metric, SOLO};
use super::floor::{Dense, Shape};
use super::json::{Json, member};
use super::logits::Distance;
use super::rounds::Round;
use super::stats::{Summary, ratios};

/// Beyond this share of the machine, others have disturbed a measurement.
const DISTURBED: f64 = 0.05;

/// Everything of one run.
pub(crate) struct Results {
    pub(crate) engines: Vec<Engine>,
    pub(crate) rounds: Vec<Round>,
    pub(crate) distances: Vec<Distance>,
    pub(crate) shape: Shape,
    pub(crate) dense: Dense,
    pub(crate) threads: u32,
}

/// A figure beside another, or beside a floor.
struct Comparison {
    case: &'static str,
    what: String,
    summary: Summary,
    target: Option<Target>,
}

#[derive(Clone, Copy)]
enum Target {
    AtLeast(f64),
    AtMost(f64),
}

impl Target {
    fn is_met(self, value: f64) -> bool {
        match self {
            Target::AtLeast(target) => value >= target,
            Target::AtMost(target) => value <= target,
        }
    }

    fn words(self) -> String {
        match self {
            Target::AtLeast(target) => format!("at least {target:.2}"),
            Target::AtMost(target) => format!("at most {target:.2}"),
        }
    }
}

/// Name, unit, and how often it must be as good as (llama.cpp, ik_llama.cpp).
fn of_metric(metric: Metric) -> (&'static str, &'static str, &'static str, Option<f64>, Option<f64>) {
    match metric {
        Metric::Vector => ("C1", "MXFP4, one token", "GB/s", Some(1.8), None),
        Metric::Matrix => ("C2", "MXFP4, 64 an expert", "GOP/s", Some(2.2), None),
        Metric::Decode => ("C3", "decode", "tokens/s", Some(1.5), None),
        Metric::Prefill => ("C4", "prefill 512", "tokens/s", Some(1.9), Some(1.2)),
        Metric::Busy => ("C5", "decode, a core taken", "tokens/s", Some(2.0), None),
        Metric::Batched => ("C6", "decode of 8", "tokens/s", Some(1.8), None),
        Metric::FirstToken => ("C7", "first token", "s", Some(3.0), None),
    }
}

/// The load of a decode that has a byte floor.
fn decode_load(metric: Metric) -> Option<Load> {
    match metric {
        Metric::Decode => Some(SOLO),
        Metric::Batched => Some(BATCHED),
        Metric::Busy => Some(BUSY),
        Metric::Vector | Metric::Matrix | Metric::Prefill | Metric::FirstToken => None,
    }
}

impl Results {
    fn series(&self, engine: Engine, metric: Metric) -> Vec<Option<f64>> {
        self.rounds.iter().map(|round| round.figure(engine, metric)).collect()
    }

    /// Bytes that a step of a decode must read.
    fn floor_bytes(&self, load: Load) -> f64 {
        let context = f64::from(load.prompt) + f64::from(load.generate) / 2.0;
        self.shape.decode_bytes(self.dense.bytes(), f64::from(load.batch), context)
    }

    /// The least time that the machine allows over the time that it took, at the ceilings of the round itself: of
    /// reading for a decode and for one token's experts, of int8 arithmetic for many tokens'.
    fn floor_shares(&self, engine: Engine, metric: Metric) -> Vec<f64> {
        let share = |round: &Round| {
            let figure = round.figure(engine, metric)?;
            match (metric, decode_load(metric)) {
                (Metric::Vector, _) => Some(figure / round.ceiling()?),
                (Metric::Matrix, _) => Some(figure / round.int8_gop_s()?),
                (_, load) => {
                    let load = load?;
                    let steps_per_second = figure / f64::from(load.batch);
                    Some(self.floor_bytes(load) / 1e9 * steps_per_second / round.ceiling()?)
                }
            }
        };
        self.rounds.iter().filter_map(share).collect()
    }

    fn comparisons(&self) -> Vec<Comparison> {
        let mut all = Vec::new();
        let mut add = |case, what: String, values: &[f64], target| {
            all.extend(Summary::of(values).map(|summary| Comparison { case, what, summary, target }));
        };
        for metric in Metric::ALL {
            let (case, name, _, llama, ik) = of_metric(metric);
            let ours = self.series(Engine::Phalanx, metric);
            for peer in self.engines.iter().filter(|engine| **engine != Engine::Phalanx) {
                let theirs = self.series(*peer, metric);
                // Always above one when Phalanx is better: for times, theirs over ours.
                let values = if metric == Metric::FirstToken { ratios(&theirs, &ours) } else { ratios(&ours, &theirs) };
                let target = if *peer == Engine::Llama { llama } else { ik };
                add(case, format!("{name}, times as fast as {}", peer.name()), &values, target.map(Target::AtLeast));
            }
            let floor = match metric {
                Metric::Vector => Some(("raw read", 0.9)),
                Metric::Matrix => Some(("the int8 peak", 0.6)),
                Metric::Decode => Some(("the byte floor", 0.8)),
                _ => None,
            };
            if let Some((floor, least)) = floor {
                let shares = self.floor_shares(Engine::Phalanx, metric);
                add(case, format!("{name}, share of {floor}"), &shares, Some(Target::AtLeast(least)));
            }
            if metric == Metric::Busy {
                let left = 1.0 - 1.0 / f64::from(self.threads);
                for engine in &self.engines {
                    let kept = ratios(&self.series(*engine, Metric::Busy), &self.series(*engine, Metric::Decode));
                    let target = (*engine == Engine::Phalanx).then_some(Target::AtLeast(left));
                    add(case, format!("{}: speed kept with a core taken", engine.name()), &kept, target);
                }
            }
        }
        let mean = |engine| self.distances.iter().find(|d| d.engine == engine).map(Distance::mean);
        for peer in self.engines.iter().filter(|engine| **engine != Engine::Phalanx) {
            let ratio: Option<f64> = mean(Engine::Phalanx).and_then(|ours| Some(ours / mean(*peer)?));
            let target = (*peer == Engine::Llama).then_some(Target::AtMost(1.0));
            let what = format!("mean divergence of logits over that of {}", peer.name());
            add("C8", what, &ratio.into_iter().collect::<Vec<_>>(), target);
        }
        all
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let mut text = String::new();
        // Writing to a string does not fail.
        let _ = self.write_figures(&mut text);
        let _ = self.write_comparisons(&mut text);
        let _ = self.write_noise(&mut text);
        text
    }

    fn write_figures(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n{:<38}{:>9}  {:<28}of floor", "", "median", "least to most")?;
        let mut rows: Vec<(u32, Vec<f64>)> = Vec::new();
        for (threads, speed) in self.rounds.iter().flat_map(|round| &round.read_gb_s) {
            match rows.iter_mut().find(|(found, _)| found == threads) {
                Some((_, speeds)) => speeds.push(*speed),
                None => rows.push((*threads, vec![*speed])),
            }
        }
        for (threads, speeds) in rows {
            let name = format!("memory read, {threads} thread{}", if threads == 1 { "" } else { "s" });
            write_row(text, &name, &speeds, "GB/s", None)?;
        }
        for metric in Metric::ALL {
            let (case, name, unit, ..) = of_metric(metric);
            let mut name = format!("{case} {name}");
            for engine in &self.engines {
                let values: Vec<f64> = self.series(*engine, metric).into_iter().flatten().collect();
                if values.is_empty() {
                    continue;
                }
                let share = Summary::of(&self.floor_shares(*engine, metric)).map(|summary| summary.median);
                write_row(text, &format!("{name:<25}{}", engine.name()), &values, unit, share)?;
                name.clear();
            }
        }
        for (i, distance) in self.distances.iter().enumerate() {
            let name = if i == 0 { "C8 logits, divergence" } else { "" };
            let kl = Summary::of(&distance.kl).unwrap_or(Summary { median: 0.0, least: 0.0, most: 0.0 });
            let Summary { median, most, .. } = kl;
            let name = format!("{name:<25}{}", distance.engine.name());
            let spread = format!("mean; median {median:.1e}, at most {most:.1e} nats");
            let same = format!("the same first choice at {} of {}", distance.same_token, distance.kl.len());
            writeln!(text, "{name:<38}{:>9.1e}  {spread}; {same}", distance.mean())?;
        }
        Ok(())
    }

    fn write_comparisons(&self, text: &mut String) -> std::fmt::Result {
        writeln!(text, "\n{:<52}{:>7}  {:<20}target", "round by round", "median", "least to most")?;
        for Comparison { case, what, summary, target } in self.comparisons() {
            let verdict = target.map_or_else(String::new, |target| {
                format!("{:<14} {}", target.words(), if target.is_met(summary.median) { "met" } else { "MISSED" })
            });
            let spread = format!("{:.2} to {:.2}", summary.least, summary.most);
            let line = format!("{case} {what:<49}{:>7.2}  {spread:<20}{verdict}", summary.median);
            writeln!(text, "{}", line.trim_end())?;
        }
        Ok(())
    }

    fn write_noise(&self, text: &mut String) -> std::fmt::Result {
        let turns = || self.rounds.iter().flat_map(|round| &round.turns);
        let noise = || turns().flat_map(|(_, turn)| &turn.noise);
        let Some(others) = Summary::of(&noise().map(|noise| noise.others).collect::<Vec<_>>()) else {
            return Ok(());
        };
        let loads: Vec<&str> = self.rounds.iter().map(|round| round.load_average.as_str()).collect();
        writeln!(text, "\nload averages (1, 5, 15 min) as rounds began: {}", loads.join("; "))?;
        for engine in &self.engines {
            let of = turns().filter(|(found, _)| found == engine).flat_map(|(_, turn)| &turn.noise);
            if let Some(switches) = Summary::of(&of.map(|noise| noise.involuntary).collect::<Vec<_>>()) {
                let (name, median, most) = (engine.name(), switches.median, switches.most);
                writeln!(text, "involuntary context switches of {name}: {median:.0}, at most {most:.0} a measurement")?;
            }
        }
        let (median, most) = (others.median * 100.0, others.most * 100.0);
        writeln!(text, "other programs took {median:.0} % of the machine, at most {most:.0} %")?;
        if others.median > DISTURBED || others.most > 2.0 * DISTURBED {
            writeln!(
                text,
                "WARNING: the machine was busy. Engines that wait by spinning suffer most: stop what else runs and \
                 measure again before you believe a ratio."
            )?;
        }
        if self.rounds.len() < 7 {
            writeln!(text, "WARNING: {} rounds; 7 are the least to report.", self.rounds.len())?;
        }
        Ok(())
    }

    /// For machines, every round; `more` is put in front.
    pub(crate) fn json(&self, more: Vec<(String, Json)>) -> Json {
        let mut members = more;
        let loads = [("decode", SOLO), ("batched_decode", BATCHED), ("busy_decode", BUSY)];
        let floors = loads.map(|(name, load)| {
            let shape = [
                member("prompt", load.prompt),
                member("generate", load.generate),
                member("batch", load.batch),
                member("floor_bytes", self.floor_bytes(load)),
            ];
            member(name, Json::from(shape))
        });
        members.push(member("loads", Json::from(floors)));
        members.push(member("rounds", self.rounds.iter().map(round_json).collect::<Vec<_>>()));
        members.push(member("logits", self.distances.iter().map(Distance::json).collect::<Vec<_>>()));
        let comparisons = self.comparisons().into_iter().map(|Comparison { case, what, summary, target }| {
            Json::from([
                member("case", case),
                member("what", what),
                member("median", summary.median),
                member("least", summary.least),
                member("most", summary.most),
                member("target", target.map(Target::words)),
                ("met".into(), target.map_or(Json::Null, |target| Json::Bool(target.is_met(summary.median)))),
            ])
        });
        members.push(member("comparisons", comparisons.collect::<Vec<_>>()));
        Json::Object(members)
    }
}

fn write_row(text: &mut String, name: &str, values: &[f64], unit: &str, share: Option<f64>) -> std::fmt::Result {
    let Some(summary) = Summary::of(values) else { return Ok(()) };
    let spread = format!("{:.2} to {:.2} {unit}", summary.least, summary.most);
    let share = share.map_or_else(String::new, |share| format!("{:.0} %", share * 100.0));
    let line = format!("{name:<38}{:>9.2}  {spread:<28}{share:>5}", summary.median);
    writeln!(text, "{}", line.trim_end())
}

fn round_json(round: &Round) -> Json {
    let turns = round.turns.iter().map(|(engine, turn)| {
        let mut members = vec![member("engine", engine.name())];
        members.extend(turn.figures.iter().map(|(metric, value)| member(metric.name(), *value)));
        let noise = turn.noise.iter().map(|noise| {
            Json::from([member("others", noise.others), member("involuntary_switches", noise.involuntary)])
        });
        members.push(member("noise", noise.collect::<Vec<_>>()));
        members.push(member("peak_gb", turn.peak_gb));
        members.push(member("int8_gop_s", turn.int8_gop_s));
        Json::Object(members)
    });
    let read = round.read_gb_s.iter().map(|(threads, speed)| member(&format!("{threads}_threads"), *speed));
    Json::from([
        member("read_gb_s", Json::Object(read.collect())),
        member("load_average", round.load_average.as_str()),
        member("turns", turns.collect::<Vec<_>>()),
    ])
}

#[cfg(test)]
mod tests {
    use super::super::engine::{Noise, Turn};
    use super::*;

    fn turn(figures: &[(Metric, f64)], others: f64) -> Turn {
        let noise = vec![Noise { others, involuntary: 3.0 }];
        Turn { figures: figures.to_vec(), noise, ..Turn::default() }
    }

    /// Two engines in two rounds, the second at half speed, on a model whose step reads 1 GB or so.
    fn results(others: f64) -> Results {
        let shape = r#"{"hidden":2880,"inter":2880,"layers":2,"experts":32,"topk":4,"heads":64,"kv":8,"hd":64,
                        "vocab":201088,"window":128}"#;
        let shape = Shape::from_json(&Json::parse(shape).unwrap()).unwrap();
        let round = |speed: f64| Round {
            read_gb_s: vec![(1, 20.0 * speed), (2, 40.0 * speed)],
            turns: vec![
                (
                    Engine::Phalanx,
                    Turn {
                        int8_gop_s: Some(800.0),
                        ..turn(
                            &[
                                (Metric::Decode, 24.0 * speed),
                                (Metric::FirstToken, 1.0),
                                (Metric::Busy, 18.0),
                                (Metric::Vector, 30.0 * speed),
                                (Metric::Matrix, 600.0),
                            ],
                            others,
                        )
                    },
                ),
                (
                    Engine::Llama,
                    turn(&[(Metric::Decode, 20.0 * speed), (Metric::FirstToken, 4.0), (Metric::Busy, 3.0)], others),
                ),
            ],
            load_average: "0.1 0.2 0.3".into(),
        };
        Results {
            engines: vec![Engine::Phalanx, Engine::Llama],
            rounds: vec![round(1.0), round(0.5)],
            distances: Vec::new(),
            shape,
            dense: Dense::Bf16,
            threads: 2,
        }
    }

    #[test]
    fn ratios_and_shares_are_taken_within_a_round() {
        let results = results(0.0);
        let comparisons = results.comparisons();
        let find = |what: &str| {
            let found = comparisons.iter().find(|c| c.what.contains(what)).unwrap();
            (found.summary, found.target.map(|t| t.is_met(found.summary.median)))
        };
        let (decode, met) = find("decode, times as fast as llama.cpp");
        assert!((decode.least - 1.2).abs() < 1e-9 && (decode.most - 1.2).abs() < 1e-9, "{decode:?}");
        assert_eq!(met, Some(false), "1.2 is less than 1.5");
        let (first, met) = find("first token");
        assert_eq!((first.median, met), (4.0, Some(true)), "a time is better when it is shorter");
        let (share, _) = find("byte floor");
        let bytes = results.floor_bytes(SOLO);
        assert!((share.median - bytes / 1e9 * 24.0 / 40.0).abs() < 1e-9, "{share:?} of {bytes}");
        assert_eq!(share.least, share.most, "the ceiling is that of the same round");
        assert_eq!(find("raw read").0.median, 0.75);
        let (peak, met) = find("int8 peak");
        assert_eq!((peak.median, met), (0.75, Some(true)));
        let (kept, met) = find("Phalanx: speed kept");
        assert_eq!((kept.least, kept.most, met), (0.75, 1.5, Some(true)));
    }

    #[test]
    fn the_table_names_what_was_measured_and_a_busy_machine() {
        let quiet = results(0.01).table();
        for words in ["memory read, 2 threads", "C3 decode", "C7 first token", "MISSED", "of the int8 peak"] {
            assert!(quiet.contains(words), "{words:?} is not in\n{quiet}");
        }
        assert!(!quiet.contains("C6"), "what was not measured has no line\n{quiet}");
        assert!(!quiet.contains("machine was busy") && quiet.contains("2 rounds; 7 are the least"), "{quiet}");
        assert!(results(0.3).table().contains("WARNING: the machine was busy"));
    }

    #[test]
    fn every_round_is_in_the_json() {
        let json = results(0.0).json(vec![member("machine", "m")]);
        let read = Json::parse(&json.to_string()).unwrap();
        assert_eq!(read, json);
        let Some(Json::List(rounds)) = read.get("rounds") else { panic!("no rounds in {read}") };
        let decode = |round: &Json, turn: usize| match round.get("turns") {
            Some(Json::List(turns)) => turns[turn].number("decode"),
            other => panic!("no turns: {other:?}"),
        };
        let llama: Vec<_> = rounds.iter().map(|round| decode(round, 1)).collect();
        assert_eq!(llama, [Ok(20.0), Ok(10.0)]);
        let floor = read.get("loads").and_then(|loads| loads.get("decode")).unwrap().number("floor_bytes").unwrap();
        assert!(floor > 1e9, "{floor}");
    }
}
