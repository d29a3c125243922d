"""Code of a child process that is to be stopped by SIGINT, whoever started the tests."""


def heeding(code: str) -> str:
    """Return the code of a program that heeds SIGINT.

    What nohup, cron or a shell's ``&`` starts ignores it, and so do its children, in which Python
    then sets no handler of its own.
    """
    return f"import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n{code}"
