# SPDX-License-Identifier: Apache-2.0
"""Load balance: counts of routed tokens, losses, the bias update, and figures."""
