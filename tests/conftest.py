"""What every test shares. Notebooks are run by nbval with their own parameters; only the clock is shortened here."""

import os

os.environ.setdefault("MAESTLIB_MINUTES", "0.1")  # of training, where a notebook does not say
