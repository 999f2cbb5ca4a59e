//! `why` for every process of random trees, against what the trees wrote down themselves.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use serde_json::{Value, json};
use zinit_tests::sandbox::{DEADLINE, Sandbox};
use zinit_tracker::StopPolicy;

/// How many processes each tree has; the sum is a thousand.
const SIZES: [usize; 7] = [1, 9, 40, 100, 150, 300, 400];

/// How many of each tree are asked for by the tool, and not only by the library.
const BY_THE_TOOL: usize = 8;

/// What a tree has logged.
#[derive(Debug, Default)]
struct Log {
    creators: BTreeMap<u32, u32>,
    exits: BTreeMap<u32, i32>,
}

impl Log {
    fn parse(text: &str) -> Self {
        let mut log = Self::default();
        for line in text.lines() {
            let words: Vec<_> = line.split(' ').collect();
            let first = words[1].parse().unwrap();
            let before = match words[0] {
                "fork" => log.creators.insert(words[2].parse().unwrap(), first).is_some(),
                _ => log.exits.insert(first, words[2].parse().unwrap()).is_some(),
            };
            assert!(!before, "a pid was used twice: {line}");
        }
        log
    }

    /// The process, its creator, that one's creator, and so on to the root: its pid, and its status if it has exited.
    fn line(&self, pid: u32) -> Vec<(u32, Option<i32>)> {
        let line = std::iter::successors(Some(pid), |pid| self.creators.get(pid).copied());
        line.map(|pid| (pid, self.exits.get(&pid).copied())).collect()
    }
}

/// A lineage as JSON has it, in the form of [`Log::line`].
fn line_of(lineage: &Value) -> Vec<(u32, Option<i32>)> {
    let links = lineage["line"].as_array().unwrap().iter();
    let number = |value: &Value| value.as_i64().unwrap();
    links
        .map(|link| {
            let status = (link["alive"] == false).then(|| number(&link["fate"]["exited"]).try_into().unwrap());
            (number(&link["pid"]).try_into().unwrap(), status)
        })
        .collect()
}

#[tokio::test]
async fn why_is_right_for_a_thousand_processes_of_random_trees() {
    let sandbox = Sandbox::new();
    let (mut asked, mut dead, mut longest) = (0, 0, 0);
    for (seed, size) in (1_u64..).zip(SIZES) {
        let file = tempfile::NamedTempFile::new().unwrap();
        let path = file.path().to_str().unwrap();
        let mut played = sandbox.play("logged-tree", [&seed.to_string(), &size.to_string(), path]);
        let log = Log::parse(&std::fs::read_to_string(path).unwrap());
        let root = played.child.id().unwrap();
        let all: BTreeSet<_> = log.creators.keys().copied().chain([root]).collect();
        assert_eq!(all.len(), size, "{log:?}");

        for (number, pid) in all.into_iter().enumerate() {
            let expected = log.line(pid);
            assert_eq!(expected.last(), Some(&(root, None)));
            let lineage = sandbox.tracker.lineage(pid).unwrap();
            let mut answers = vec![serde_json::to_value(&lineage).unwrap()];
            if number % size.div_ceil(BY_THE_TOOL) == 0 {
                let output = sandbox.tool(&["why", &pid.to_string(), "--json"]).output().unwrap();
                answers.push(serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}")));
            }
            for answer in answers {
                assert_eq!(line_of(&answer), expected, "{pid}: {answer:#}\n{log:?}");
                assert_eq!(answer["service"]["name"], "logged-tree", "{answer:#}");
                assert_eq!(answer["pid_reused"], false, "{answer:#}");
                let links = answer["line"].as_array().unwrap();
                let main: Vec<_> = links
                    .iter()
                    .filter(|link| link["main"] == true)
                    .map(|link| &link["pid"])
                    .collect();
                assert_eq!(main, [&json!(root)], "{answer:#}");
                assert_eq!(answer["creator"]["alive"]["pid"], std::process::id(), "{answer:#}");
            }
            asked += 1;
            dead += usize::from(log.exits.contains_key(&pid));
            longest = longest.max(expected.len());
        }
        let policy = StopPolicy {
            grace: Duration::from_millis(200),
            kill_timeout: DEADLINE,
            ..StopPolicy::default()
        };
        sandbox.stop(&mut played, &policy).await;
        sandbox.tracker.unregister(&played.service).unwrap();
    }
    println!("{asked} processes, {dead} of them dead; the longest line has {longest}");
    assert_eq!(asked, 1000);
    assert!(dead > 100, "{dead}");
    sandbox.close();
}
