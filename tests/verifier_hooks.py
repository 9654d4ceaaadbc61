"""Last rungs for the tests of `hgpo_trl.verification`: worker processes import them from here."""

import os
import time


def sleep_on_five(reference: str, answer: str) -> bool:
    if "5" in answer:
        time.sleep(600)
    return True


def crash_on_five(reference: str, answer: str) -> bool:
    if "5" in answer:
        os._exit(3)
    return True
