//! A data set under the names of classes that a run has learnt.

use crate::data::{Dataset, Draw, Summary};
use crate::error::Result;

/// A data set whose classes have the numbers that a run knows them by.
struct Renumbered {
    data: Box<dyn Dataset>,
    classes: Vec<String>,
    /// The run's number of each class of `data`.
    numbers: Vec<u32>,
}

impl Dataset for Renumbered {
    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        let label = self.data.label(index)?;
        self.numbers.get(label as usize).copied()
    }

    fn read(&self, index: usize, draw: Draw, out: &mut [f32]) -> Result<()> {
        self.data.read(index, draw, out)
    }

    fn summary(&self) -> &Summary {
        self.data.summary()
    }
}

/// How the classes of a data set are those that a run has learnt.
#[derive(Debug, PartialEq)]
pub(super) enum Classes {
    /// They are the same, or there are none on either side.
    Same,
    /// They had other numbers, and now have the run's.
    Renumbered,
    /// Some were not learnt, which the text names; they keep their own numbers.
    Others(String),
}

/// `data` with the numbers that its classes have in `learnt`.
pub(super) fn as_learnt(data: Box<dyn Dataset>, learnt: &[String]) -> (Box<dyn Dataset>, Classes) {
    let own = data.classes();
    if learnt.is_empty() || own.is_empty() || own == learnt {
        return (data, Classes::Same);
    }
    let number = |name: &String| learnt.iter().position(|known| known == name).map(|i| i as u32);
    let unknown: Vec<&str> = own.iter().filter(|name| number(name).is_none()).map(String::as_str).collect();
    if !unknown.is_empty() {
        let shown = |names: &mut dyn Iterator<Item = &str>, all: usize| {
            let text = names.take(5).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
            if all > 5 { format!("{text} and {} more", all - 5) } else { text }
        };
        let reason = format!(
            "the images have the class{} {}, which the run has not learnt: it knows {}",
            if unknown.len() == 1 { "" } else { "es" },
            shown(&mut unknown.iter().copied(), unknown.len()),
            shown(&mut learnt.iter().map(String::as_str), learnt.len())
        );
        return (data, Classes::Others(reason));
    }
    let numbers = own.iter().filter_map(number).collect();
    (Box::new(Renumbered { data, classes: learnt.to_vec(), numbers }), Classes::Renumbered)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::digits::Digits;

    fn digits() -> Box<dyn Dataset> {
        Box::new(Digits::new(0, 12, 20).unwrap())
    }

    fn names(text: &str) -> Vec<String> {
        text.split(' ').map(str::to_owned).collect()
    }

    #[test]
    fn classes_keep_the_numbers_that_were_learnt_however_they_are_sorted_now() {
        let plain = digits();
        // In another order, and one that has no images.
        let learnt = names("9 8 7 6 5 none 4 3 2 1 0");
        let (data, found) = as_learnt(digits(), &learnt);
        assert!(found == Classes::Renumbered && data.classes() == learnt);
        for i in 0..20 {
            let name = |data: &dyn Dataset| data.classes()[data.label(i).unwrap() as usize].clone();
            assert_eq!(name(&*data), name(&*plain));
        }
        let (data, found) = as_learnt(digits(), plain.classes());
        assert!(found == Classes::Same && data.label(3) == plain.label(3));
        assert_eq!(as_learnt(digits(), &[]).1, Classes::Same);
    }

    #[test]
    fn classes_that_were_not_learnt_are_named() {
        let others = |learnt: &str| match as_learnt(digits(), &names(learnt)).1 {
            Classes::Others(reason) => reason,
            other => panic!("{other:?}"),
        };
        let reason = others("0 1 2 3 4 5 6 7 8 cat");
        assert!(reason.contains("the class \"9\"") && reason.contains("\"0\", \"1\""), "{reason}");
        let reason = others("cats dogs");
        assert!(reason.contains("and 5 more") && reason.contains("it knows \"cats\", \"dogs\""), "{reason}");
    }
}
