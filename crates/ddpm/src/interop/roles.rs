//! Classifies a state dict by the keys that lead to it: averaged weights, raw weights or optimizer state.

/// What a state dict holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Weights averaged over the training (EMA).
    Averaged,
    /// The weights that the optimizer updates, where averaged ones exist too.
    Raw,
    /// Weights whose keys do not say.
    Plain,
    /// An optimizer's moments, which are not weights.
    Optimizer,
}

impl Role {
    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Averaged => "averaged",
            Self::Raw => "raw",
            Self::Plain => "weights",
            Self::Optimizer => "an optimizer's",
        }
    }
}

const AVERAGED: [&str; 9] =
    ["ema", "emas", "averaged", "average", "averages", "avg", "swa", "shadow", "polyak"];
const RAW: [&str; 8] = ["online", "raw", "student", "source", "current", "live", "collected", "nonema"];
const OPTIMIZER: [&str; 5] = ["optimizer", "optimizers", "optim", "opt", "optimiser"];
const NOT: [&str; 4] = ["non", "no", "not", "without"];

/// Splits a key into lower-case words: `EMACallback_0` gives ema, callback, 0.
fn words(key: &str) -> Vec<String> {
    let chars: Vec<char> = key.chars().collect();
    let mut words = vec![String::new()];
    for (i, &c) in chars.iter().enumerate() {
        let after_lower = i > 0 && chars[i - 1].is_lowercase();
        let before_lower =
            i > 0 && chars[i - 1].is_uppercase() && chars.get(i + 1).is_some_and(|n| n.is_lowercase());
        if !c.is_alphanumeric() || (c.is_uppercase() && (after_lower || before_lower)) {
            words.push(String::new());
        }
        if c.is_alphanumeric()
            && let Some(word) = words.last_mut()
        {
            word.extend(c.to_lowercase());
        }
    }
    words.retain(|w| !w.is_empty());
    words
}

/// The role that one key implies for everything below it.
fn verdict(key: &str) -> Option<Role> {
    // Adam's moments.
    if key.starts_with("exp_avg") {
        return Some(Role::Optimizer);
    }
    let words = words(key);
    let has = |list: &[&str]| words.iter().any(|w| list.contains(&w.as_str()));
    if has(&OPTIMIZER) {
        Some(Role::Optimizer)
    } else if has(&AVERAGED) {
        Some(if has(&NOT) { Role::Raw } else { Role::Averaged })
    } else if has(&RAW) {
        Some(Role::Raw)
    } else {
        None
    }
}

/// Whether a dotted key path leads to averaged weights, regardless of its siblings.
pub(super) fn is_averaged(keys: &str) -> bool {
    keys.split('.').rev().find_map(verdict) == Some(Role::Averaged)
}

/// The role of the weights under `key`, one of `keys`. The innermost key with a known role decides; a neutral key with an
/// averaged sibling is raw.
pub(super) fn role(key: &str, keys: &[String]) -> Role {
    let parts: Vec<&str> = key.split('.').collect();
    let verdicts: Vec<_> = parts.iter().map(|part| verdict(part)).collect();
    if verdicts.contains(&Some(Role::Optimizer)) {
        return Role::Optimizer;
    }
    for (i, verdict_here) in verdicts.iter().enumerate().rev() {
        if let Some(role) = verdict_here {
            return *role;
        }
        let beside_averages = keys.iter().any(|other| {
            let mut others = other.split('.');
            parts[..i].iter().all(|part| others.next() == Some(part))
                && others.next().is_some_and(|o| o != parts[i] && verdict(o) == Some(Role::Averaged))
        });
        if beside_averages {
            return Role::Raw;
        }
    }
    Role::Plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_innermost_key_decides_and_a_neutral_sibling_of_averages_is_raw() {
        let all = |keys: &[&str]| -> Vec<Role> {
            let keys: Vec<String> = keys.iter().map(|k| (*k).to_owned()).collect();
            keys.iter().map(|k| role(k, &keys)).collect()
        };
        use Role::{Averaged, Optimizer, Plain, Raw};
        assert_eq!(all(&["model", "ema.online_model", "ema.ema_model"]), [Raw, Raw, Averaged]);
        assert_eq!(all(&["model", "ema.model", "ema.shadow"]), [Raw, Raw, Averaged]);
        assert_eq!(all(&["model", "ema"]), [Raw, Averaged]);
        assert_eq!(all(&["state_dict.model", "state_dict.model_ema"]), [Raw, Averaged]);
        assert_eq!(all(&["params", "params_ema"]), [Raw, Averaged]);
        assert_eq!(all(&["state_dict", "callbacks.EMACallback.weights"]), [Plain, Averaged]);
        assert_eq!(all(&["ema.collected_params", "ema.shadow_params"]), [Raw, Averaged]);
        assert_eq!(all(&["unet_non_ema", "unet_ema"]), [Raw, Averaged]);
        assert_eq!(all(&["exp_avg", "exp_avg_sq", "opt.m"]), [Optimizer; 3]);
        assert_eq!(all(&["model", "target", ""]), [Plain; 3]);
        // Matches whole words only: "schema" contains "ema" but not as a word.
        assert_eq!(all(&["schema", "remake.swan"]), [Plain; 2]);
    }
}
