//! Maps the classes of a data set to the indices that a run was trained with.

use crate::data::{AugmentKey, Dataset, Summary};
use std::borrow::Cow;

/// A data set whose classes have a run's indices.
struct Reindexed {
    data: Box<dyn Dataset>,
    classes: Vec<String>,
    /// The run's index of each class of `data`.
    indices: Vec<u32>,
}

impl Dataset for Reindexed {
    fn dims(&self) -> [usize; 4] {
        self.data.dims()
    }

    fn classes(&self) -> &[String] {
        &self.classes
    }

    fn label(&self, index: usize) -> Option<u32> {
        let label = self.data.label(index)?;
        self.indices.get(label as usize).copied()
    }

    fn read(&self, index: usize, draw: AugmentKey, out: &mut [f32]) -> crate::data::Result<()> {
        self.data.read(index, draw, out)
    }

    fn summary(&self) -> Cow<'_, Summary> {
        self.data.summary()
    }
}

/// How the classes of a data set relate to those a run was trained on.
#[derive(Debug, PartialEq)]
pub(super) enum ClassMatch {
    /// They are equal, or either side has none.
    Same,
    /// They had other indices and were mapped to the run's.
    Reindexed,
    /// Some are unknown to the run; the text names them. They keep their own indices.
    Unknown(String),
}

/// `data` with the indices that its classes have in `trained`.
pub(super) fn with_class_indices(
    data: Box<dyn Dataset>,
    trained: &[String],
) -> (Box<dyn Dataset>, ClassMatch) {
    let own = data.classes();
    if trained.is_empty() || own.is_empty() || own == trained {
        return (data, ClassMatch::Same);
    }
    let index = |name: &String| trained.iter().position(|known| known == name).map(|i| i as u32);
    let unknown: Vec<&str> = own.iter().filter(|name| index(name).is_none()).map(String::as_str).collect();
    if !unknown.is_empty() {
        let shown = |names: &mut dyn Iterator<Item = &str>, all: usize| {
            let text = names.take(5).map(|name| format!("{name:?}")).collect::<Vec<_>>().join(", ");
            if all > 5 { format!("{text} and {} more", all - 5) } else { text }
        };
        let reason = format!(
            "the images have the class{} {}, on which the run was not trained; it knows {}",
            if unknown.len() == 1 { "" } else { "es" },
            shown(&mut unknown.iter().copied(), unknown.len()),
            shown(&mut trained.iter().map(String::as_str), trained.len())
        );
        return (data, ClassMatch::Unknown(reason));
    }
    let indices = own.iter().filter_map(index).collect();
    (Box::new(Reindexed { data, classes: trained.to_vec(), indices }), ClassMatch::Reindexed)
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
    fn classes_keep_their_trained_indices_in_any_order() {
        let plain = digits();
        // In another order, with one that has no images.
        let trained = names("9 8 7 6 5 none 4 3 2 1 0");
        let (data, found) = with_class_indices(digits(), &trained);
        assert!(found == ClassMatch::Reindexed && data.classes() == trained);
        for i in 0..20 {
            let name = |data: &dyn Dataset| data.classes()[data.label(i).unwrap() as usize].clone();
            assert_eq!(name(&*data), name(&*plain));
        }
        let (data, found) = with_class_indices(digits(), plain.classes());
        assert!(found == ClassMatch::Same && data.label(3) == plain.label(3));
        assert_eq!(with_class_indices(digits(), &[]).1, ClassMatch::Same);
    }

    #[test]
    fn unknown_classes_are_named() {
        let others = |trained: &str| match with_class_indices(digits(), &names(trained)).1 {
            ClassMatch::Unknown(reason) => reason,
            other => panic!("{other:?}"),
        };
        let reason = others("0 1 2 3 4 5 6 7 8 cat");
        assert!(reason.contains("the class \"9\"") && reason.contains("\"0\", \"1\""), "{reason}");
        let reason = others("cats dogs");
        assert!(reason.contains("and 5 more") && reason.contains("it knows \"cats\", \"dogs\""), "{reason}");
    }
}
