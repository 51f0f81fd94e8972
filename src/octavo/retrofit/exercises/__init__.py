"""Exercises made from any text: what a user of a long context does, so that adapters learn to keep what it needs.

Passages repeated word for word, quoted, continued or edited after up to a row of other text; tables, JSON and lists
with questions; facts scattered through a text; chains of variables. Half are chats where the tokenizer has a
template, half plain text. All is made with the generator that is given, from the sources' own tokens. The
evaluation's cases use none of these wordings, so that it does not measure what was trained.
"""

from octavo.retrofit.exercises.session import exercise_sequence

__all__ = ["exercise_sequence"]
