//! Reads the text format of OpenMetrics 1.0 by the letter of its specification, as far as we use it, and refuses the rest.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, bail, ensure};

/// All metric families of a text, by name.
#[derive(Debug, Default)]
pub struct Exposition(BTreeMap<String, Family>);

#[derive(Debug, Default)]
struct Family {
    kind: String,
    help: String,
    unit: Option<String>,
    samples: Vec<Sample>,
}

type Labels = BTreeMap<String, String>;

#[derive(Debug)]
struct Sample {
    name: String,
    labels: Labels,
    value: f64,
}

impl Exposition {
    /// Reads a whole text.
    ///
    /// # Errors
    ///
    /// Names the line that is not as it must be.
    pub fn parse(text: &str) -> Result<Self> {
        let body = text.strip_suffix("# EOF\n").context("the last line is not `# EOF`")?;
        let mut families: Vec<(String, Family)> = Vec::new();
        for line in body.lines() {
            read(&mut families, line).with_context(|| format!("in line {line:?}"))?;
        }
        let mut exposition = Self::default();
        for (name, family) in families {
            family.check(&name).with_context(|| format!("of {name}"))?;
            let earlier = exposition.0.insert(name.clone(), family);
            ensure!(earlier.is_none(), "{name} comes twice");
        }
        Ok(exposition)
    }

    /// The value of the sample with exactly these labels.
    #[must_use]
    pub fn value(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let wanted: Labels = labels
            .iter()
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        let found = self
            .samples()
            .find(|sample| sample.name == name && sample.labels == wanted);
        found.map(|sample| sample.value)
    }

    /// The sum of all samples of this name.
    #[must_use]
    pub fn sum(&self, name: &str) -> f64 {
        let wanted = self.samples().filter(|sample| sample.name == name);
        wanted.map(|sample| sample.value).sum()
    }

    /// The names of all samples.
    #[must_use]
    pub fn names(&self) -> BTreeSet<&str> {
        self.samples().map(|sample| sample.name.as_str()).collect()
    }

    fn samples(&self) -> impl Iterator<Item = &Sample> {
        self.0.values().flat_map(|family| &family.samples)
    }
}

/// Takes in one line; a family ends where another begins.
fn read(families: &mut Vec<(String, Family)>, line: &str) -> Result<()> {
    let Some(comment) = line.strip_prefix("# ") else {
        let sample = sample(line)?;
        let (_, family) = families.last_mut().context("a sample of no family")?;
        family.samples.push(sample);
        return Ok(());
    };
    let mut words = comment.splitn(3, ' ');
    let (keyword, name, value) = (words.next(), words.next(), words.next());
    let (Some(name), Some(value)) = (name, value) else {
        bail!("neither HELP, TYPE nor UNIT of a family");
    };
    if families.last().is_none_or(|(last, _)| last != name) {
        families.push((name.to_owned(), Family::default()));
    }
    let (_, family) = families.last_mut().context("just pushed")?;
    ensure!(family.samples.is_empty(), "it comes behind samples");
    let field = match keyword {
        Some("HELP") => &mut family.help,
        Some("TYPE") => &mut family.kind,
        Some("UNIT") => family.unit.get_or_insert_default(),
        _ => bail!("neither HELP, TYPE nor UNIT"),
    };
    ensure!(field.is_empty(), "it comes twice");
    value.clone_into(field);
    Ok(())
}

impl Family {
    fn check(&self, family: &str) -> Result<()> {
        ensure!(is_name(family), "no name");
        ensure!(
            !self.help.is_empty() && !self.help.contains(['"', '\\']),
            "no plain HELP"
        );
        if let Some(unit) = &self.unit {
            ensure!(family.ends_with(&format!("_{unit}")), "the unit is not in the name");
        }
        for unit in ["seconds", "bytes"] {
            ensure!(!family.ends_with(unit) || self.unit.is_some(), "its unit is not stated");
        }
        let suffix = match self.kind.as_str() {
            "counter" => "_total",
            "info" => "_info",
            "gauge" => "",
            "histogram" => return self.check_histogram(family),
            _ => bail!("type {:?}", self.kind),
        };
        ensure!(!family.ends_with("_total"), "a family does not end in _total");
        let mut seen = BTreeSet::new();
        for sample in &self.samples {
            ensure!(sample.name == format!("{family}{suffix}"), "sample {}", sample.name);
            ensure!(sample.value >= 0.0, "{sample:?} is negative");
            ensure!(self.kind != "info" || sample.value == 1.0, "{sample:?} is not 1");
            ensure!(seen.insert(&sample.labels), "{sample:?} comes twice");
        }
        Ok(())
    }

    /// For each set of labels: buckets that grow, of which the last holds all, their count, and a sum.
    fn check_histogram(&self, family: &str) -> Result<()> {
        let mut histograms: BTreeMap<Labels, Vec<(&str, f64)>> = BTreeMap::new();
        let mut bounds: BTreeMap<Labels, f64> = BTreeMap::new();
        for sample in &self.samples {
            let suffix = sample.name.strip_prefix(family).context("a sample of another family")?;
            let mut labels = sample.labels.clone();
            let bound = labels.remove("le");
            ensure!(
                bound.is_some() == (suffix == "_bucket"),
                "{sample:?} has a bound, or lacks one"
            );
            if let Some(bound) = bound {
                let bound: f64 = bound.parse().context("no bound")?;
                let before = bounds.insert(labels.clone(), bound);
                ensure!(before.is_none_or(|before| before < bound), "{sample:?} is not in order");
            }
            histograms.entry(labels).or_default().push((suffix, sample.value));
        }
        for (labels, samples) in histograms {
            let of = |wanted| {
                samples
                    .iter()
                    .filter(move |(suffix, _)| *suffix == wanted)
                    .map(|(_, value)| *value)
            };
            let buckets: Vec<_> = of("_bucket").collect();
            ensure!(buckets.is_sorted(), "buckets of {labels:?} shrink");
            ensure!(
                bounds.get(&labels) == Some(&f64::INFINITY),
                "{labels:?} has no last bucket"
            );
            let count: Vec<_> = of("_count").collect();
            ensure!(
                count.len() == 1 && buckets.last() == count.first(),
                "the count of {labels:?} is not that of its buckets"
            );
            ensure!(
                of("_sum").count() == 1 && buckets.len() + 2 == samples.len(),
                "{labels:?} has other samples"
            );
        }
        Ok(())
    }
}

fn is_name(text: &str) -> bool {
    let is_letter = |c: char| c.is_ascii_alphabetic() || c == '_' || c == ':';
    text.starts_with(is_letter) && text.chars().all(|c| is_letter(c) || c.is_ascii_digit())
}

/// `name{label="value",…} number`
fn sample(line: &str) -> Result<Sample> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(end);
    ensure!(is_name(name), "no name");
    let mut labels = Labels::new();
    if let Some(mut text) = rest.strip_prefix('{') {
        while !text.starts_with('}') {
            let (label, after) = text.split_once("=\"").context("a label without value")?;
            ensure!(is_name(label) && !label.contains(':'), "no name of a label: {label}");
            let (value, after) = quoted(after)?;
            ensure!(labels.insert(label.to_owned(), value).is_none(), "{label} comes twice");
            text = match after.strip_prefix(',') {
                Some(next) => {
                    ensure!(!next.starts_with('}'), "a comma at the end");
                    next
                }
                None => after,
            };
            ensure!(after.starts_with([',', '}']), "no comma between labels");
        }
        rest = &text[1..];
    }
    let value = rest.strip_prefix(' ').context("no space before the value")?;
    Ok(Sample {
        name: name.to_owned(),
        labels,
        value: value.parse().context("no number")?,
    })
}

/// The text up to the closing quote, and what follows that.
fn quoted(text: &str) -> Result<(String, &str)> {
    let mut value = String::new();
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Ok((value, &text[at + 1..])),
            '\\' => value.push(match chars.next() {
                Some((_, 'n')) => '\n',
                Some((_, c @ ('"' | '\\'))) => c,
                _ => bail!("an unknown escape"),
            }),
            c => value.push(c),
        }
    }
    bail!("the value of a label has no end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allowed_is_read() {
        let text = "# HELP a A.\n# TYPE a counter\na_total{x=\"1\",y=\"a\\\"\\\\\\nb\"} 3\na_total{x=\"2\"} 4\n\
                    # HELP b_seconds B.\n# TYPE b_seconds gauge\n# UNIT b_seconds seconds\nb_seconds 0.5\n# EOF\n";
        let read = Exposition::parse(text).unwrap();
        assert_eq!(read.value("a_total", &[("y", "a\"\\\nb"), ("x", "1")]), Some(3.0));
        assert_eq!(read.value("a_total", &[("x", "1")]), None);
        assert_eq!(read.sum("a_total"), 7.0);
        assert_eq!(read.names(), BTreeSet::from(["a_total", "b_seconds"]));
    }

    #[test]
    fn what_is_not_is_refused() {
        let (help, kind) = ("# HELP a A.\n", "# TYPE a counter\n");
        for bad in [
            String::new(),
            format!("{help}{kind}a_total 1\n"),
            format!("{help}{kind}a 1\n# EOF\n"),
            format!("{help}{kind}a_total -1\n# EOF\n"),
            format!("{help}{kind}a_total one\n# EOF\n"),
            format!("{help}{kind}\na_total 1\n# EOF\n"),
            format!("{kind}a_total 1\n# EOF\n"),
            format!("{help}{kind}a_total 1\na_total 2\n# EOF\n"),
            format!("{help}{kind}a_total{{x=\"1\"y=\"2\"}} 1\n# EOF\n"),
            format!("{help}{kind}a_total{{x=\"1}} 1\n# EOF\n"),
            format!("{help}{kind}a_total{{x=\"\\t\"}} 1\n# EOF\n"),
            format!("{help}{kind}a_total 1\n{help}{kind}# EOF\n"),
            format!("a_total 1\n{help}{kind}# EOF\n"),
            "# HELP a_seconds A.\n# TYPE a_seconds gauge\na_seconds 1\n# EOF\n".to_owned(),
            "# HELP a A.\n# TYPE a gauge\n# UNIT a seconds\na 1\n# EOF\n".to_owned(),
        ] {
            assert!(Exposition::parse(&bad).is_err(), "{bad}");
        }
    }
}
