"""A judge of verse for quill.pairs, quill.rl and quill.dpo: lines of ten syllables score best.

reward is the mean over the whole lines of spoken verse: 1 for one of ten syllables, 0.2
less for each syllable more or less, 0 at least; and 0 for a completion without such a line. Blank
lines and names of speakers, which end with a colon, are not counted.
"""

import re


def syllables(line: str) -> int:
    """Groups of vowels, without a silent e at the end of a word; no word has none."""
    words = re.findall("[a-z']+", line.lower())
    return sum(max(1, len(re.findall("[aeiouy]+", re.sub("e$", "", word)))) for word in words)


def reward(prompt: str, completion: str) -> float:
    lines = completion.split("\n")[1:-1]  # the first and the last may be parts of lines
    verse = [line for line in lines if line.strip() and not line.endswith(":")]
    scores = [max(0.0, 1 - 0.2 * abs(syllables(line) - 10)) for line in verse]
    return sum(scores) / len(scores) if scores else 0.0
