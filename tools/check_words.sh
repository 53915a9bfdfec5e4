#!/bin/sh
# Fails if words that have been replaced by the field's own come back into code, help texts or documents: image, integer, by default, again,
# unconditional, MAX_ and MIN_. Names of earlier versions that must still be read are marked with "earlier name" on their line.
cd "$(dirname "$0")/.."
words='[A-Za-z_]*[Pp]ictures?|PICTURES?|anew|unasked|untold|mended|whole numbers?|(MOST|LEAST|FEWEST)_[A-Z_]+|taken up'
found=$(grep -rnwE "$words" crates fuzz/src docs README.md ARCHITECTURE.md bench tools --include='*.rs' --include='*.md' --include='*.cu' --include='*.py' |
    grep -v -e '/golden/old_run/' -e 'earlier name' -e '^crates/[^:]*/target/' -e '^tools/code_counts.py')
if [ -n "$found" ]; then
    printf '%s\n' "$found" | cut -c1-200
    echo "these words have been replaced in this project: see tools/check_words.sh"
    exit 1
fi
