//! Results, as a table and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use crate::{
    figure::{Outcome, Row, Series, Spread, Target, Unit},
    machine::Machine,
    peers::Version,
};

/// All that a run has found.
pub(crate) struct Results {
    machine: Machine,
    versions: Vec<Version>,
    quick: bool,
    load_at_end: String,
    rows: Vec<(&'static str, Row)>,
}

impl Results {
    pub(crate) fn new(machine: Machine, versions: Vec<Version>, quick: bool) -> Self {
        Self {
            machine,
            versions,
            quick,
            load_at_end: String::new(),
            rows: Vec::new(),
        }
    }

    pub(crate) fn add(&mut self, subject: &'static str, rows: Vec<Row>) {
        self.rows.extend(rows.into_iter().map(|row| (subject, row)));
    }

    /// Notes what else the machine did meanwhile.
    pub(crate) fn end(&mut self, load: String) {
        self.load_at_end = load;
    }

    pub(crate) fn json(&self) -> Value {
        let rows: Vec<_> = self.rows.iter().map(|(subject, row)| row_json(subject, row)).collect();
        let versions: Vec<_> = self
            .versions
            .iter()
            .map(|version| match &version.found {
                Ok(found) => json!({"name": version.name, "version": found}),
                Err(reason) => json!({"name": version.name, "missing": reason}),
            })
            .collect();
        json!({
            "machine": self.machine.json(),
            "load_at_end": self.load_at_end,
            "quick": self.quick,
            "peers": versions,
            "rows": rows,
        })
    }

    pub(crate) fn markdown(&self) -> String {
        let mut text = String::new();
        let versions: Vec<_> = self
            .versions
            .iter()
            .map(|version| match &version.found {
                Ok(found) => format!("{} {found}", version.name),
                Err(_) => format!("no {}", version.name),
            })
            .collect();
        let mut line = |line: String| {
            text.push_str(&line);
            text.push('\n');
        };
        line(format!(
            "{}; load {} at the end.",
            self.machine.sentence(),
            self.load_at_end
        ));
        line(format!("Compared with: {}.", versions.join(", ")));
        if self.quick {
            line("A quick run: few rounds and small sizes. It shows that it works.".to_owned());
        }
        line(String::new());
        line("| row | what | ours | other | ratio | target | met |".to_owned());
        line("|---|---|---|---|---|---|---|".to_owned());
        let mut notes = Vec::new();
        for (subject, row) in &self.rows {
            let mark = row.note.as_ref().map(|note| {
                let number = notes.iter().position(|known| known == note).unwrap_or_else(|| {
                    notes.push(note.clone());
                    notes.len() - 1
                });
                format!(" [{}]", number + 1)
            });
            line(format!(
                "| {subject} | {}{} | {} |",
                row.what,
                mark.unwrap_or_default(),
                cells(row).join(" | ")
            ));
        }
        if !notes.is_empty() {
            line(String::new());
        }
        for (number, note) in notes.iter().enumerate() {
            line(format!("{}. {note}", number + 1));
        }
        text
    }
}

/// A row as people follow it.
pub(crate) fn line(row: &Row) -> String {
    let mut text = row.what.clone();
    let [ours, other, ratio, target, met] = cells(row);
    for (name, cell) in [
        ("", ours),
        ("against ", other),
        ("ratio ", ratio),
        ("target ", target),
        ("met: ", met),
    ] {
        if !cell.is_empty() {
            write!(text, "; {name}{cell}").expect("a string takes it");
        }
    }
    text
}

fn cells(row: &Row) -> [String; 5] {
    let target = row
        .target
        .map(|target| show_target(target, row.unit))
        .unwrap_or_default();
    match &row.outcome {
        Outcome::Skipped(reason) => [
            format!("not measured: {}", reason.replace('|', "/").replace('\n', " ")),
            String::new(),
            String::new(),
            target,
            String::new(),
        ],
        Outcome::Measured { ours, other } => [
            show_series(ours, row.unit),
            other
                .as_ref()
                .map(|other| show_series(other, row.unit))
                .unwrap_or_default(),
            row.ratios().map(show_ratio).unwrap_or_default(),
            target,
            match row.is_met() {
                Some(true) => "yes".to_owned(),
                Some(false) => "**no**".to_owned(),
                None => String::new(),
            },
        ],
    }
}

fn show_series(series: &Series, unit: Unit) -> String {
    let spread = Spread::of(&series.values);
    let value = unit.show(spread.median);
    match series.name.as_str() {
        "" => value,
        name => format!("{name}: {value}"),
    }
}

/// Three digits that say something; a ratio near 1 needs a fourth.
fn digits(value: f64) -> String {
    match value {
        100.0.. => format!("{value:.0}"),
        10.0.. => format!("{value:.1}"),
        0.1.. => format!("{value:.3}"),
        _ => format!("{value:.4}"),
    }
}

fn show_ratio(spread: Spread) -> String {
    let Spread { lower, median, upper } = spread;
    format!("{} ({}–{})", digits(median), digits(lower), digits(upper))
}

fn show_target(target: Target, unit: Unit) -> String {
    match target {
        Target::Times(most) => format!("≤ {most} ×"),
        Target::Figure(most) => format!("≤ {}", unit.show(most)),
    }
}

fn series_json(series: &Series) -> Value {
    let Spread { lower, median, upper } = Spread::of(&series.values);
    json!({"name": series.name, "median": median, "lower_quartile": lower, "upper_quartile": upper, "values": series.values})
}

fn row_json(subject: &str, row: &Row) -> Value {
    let mut value = json!({
        "row": subject,
        "what": row.what,
        "unit": row.unit.name(),
        "target": row.target.map(|target| show_target(target, row.unit)),
        "met": row.is_met(),
        "note": row.note,
    });
    match &row.outcome {
        Outcome::Skipped(reason) => value["skipped"] = json!(reason),
        Outcome::Measured { ours, other } => {
            value["ours"] = series_json(ours);
            value["other"] = json!(other.as_ref().map(series_json));
            value["ratio"] = json!(row.ratios().map(|Spread { lower, median, upper }| json!({
                "median": median, "lower_quartile": lower, "upper_quartile": upper
            })));
        }
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results() -> Results {
        let machine = Machine::describe().unwrap();
        let versions = vec![
            Version {
                name: "a",
                found: Ok("1.2".to_owned()),
            },
            Version {
                name: "b",
                found: Err("it is not installed".to_owned()),
            },
        ];
        let mut results = Results::new(machine, versions, true);
        let series = |name: &str, values: &[f64]| Series {
            name: name.to_owned(),
            values: values.to_vec(),
        };
        let pair = (series("zinit", &[1000.0, 3000.0]), series("a", &[2000.0, 3000.0]));
        let row = Row::ratio("a stop", Unit::Nanoseconds, pair.0, pair.1);
        results.add(
            "stop",
            vec![
                row.target(Target::Times(0.5)).note("why"),
                Row::figure("size", Unit::Bytes, series("", &[2048.0]))
                    .target(Target::Figure(4096.0))
                    .note("why"),
                Row::skipped("peer", "it | is\nnot there").target(Target::Times(1.0)),
            ],
        );
        results
    }

    #[test]
    fn the_table_has_a_line_a_row_and_each_note_once() {
        let text = results().markdown();
        let table: Vec<_> = text.lines().skip_while(|line| !line.starts_with("| row")).collect();
        assert_eq!(
            table,
            [
                "| row | what | ours | other | ratio | target | met |",
                "|---|---|---|---|---|---|---|",
                "| stop | a stop [1] | zinit: 2.00 µs | a: 2.50 µs | 0.750 (0.625–0.875) | ≤ 0.5 × | **no** |",
                "| stop | size [1] | 2.00 KiB |  |  | ≤ 4.00 KiB | yes |",
                "| stop | peer | not measured: it / is not there |  |  | ≤ 1 × |  |",
                "",
                "1. why",
            ]
        );
        assert!(text.contains("Compared with: a 1.2, no b.\n"), "{text}");
    }

    #[test]
    fn json_has_every_value() {
        let json = results().json();
        assert_eq!(json["rows"][0]["ours"]["values"], json!([1000.0, 3000.0]));
        assert_eq!(json["rows"][0]["ratio"]["median"], json!(0.75));
        assert_eq!(json["rows"][0]["met"], json!(false));
        assert_eq!(json["rows"][1]["other"], json!(null));
        assert_eq!(json["rows"][2]["skipped"], json!("it | is\nnot there"));
        assert_eq!(json["peers"][1], json!({"name": "b", "missing": "it is not installed"}));
        assert!(json["machine"]["kernel"].is_string());
    }
}
