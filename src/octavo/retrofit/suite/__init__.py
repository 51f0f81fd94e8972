"""The long suite: what a user of long contexts does, measured for the model itself, adapters, and their rivals.

`evaluate_long` makes cases (`tasks`, `own_words`), reads them under every policy (`scoring`) and returns a
`LongEvaluation`, which becomes JSON, a table and a plot. No case uses a wording or a seed of the training exercises.
"""

from octavo.retrofit.suite.cases import Case, CaseSet
from octavo.retrofit.suite.results import LongEvaluation, PolicyResult, SetResult
from octavo.retrofit.suite.run import evaluate_long
from octavo.retrofit.suite.settings import LongSettings
from octavo.retrofit.suite.texts import SuiteTexts, read_suite_text

__all__ = [
    "Case",
    "CaseSet",
    "LongEvaluation",
    "LongSettings",
    "PolicyResult",
    "SetResult",
    "SuiteTexts",
    "evaluate_long",
    "read_suite_text",
]
