

set local lock_timeout = '5s';
set local statement_timeout = '10min';

set local lock_timeout = '5s';
set local statement_timeout = '10min';

